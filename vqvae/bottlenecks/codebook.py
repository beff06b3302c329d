"""What bottlenecks with codes share: the codebook and how it learns, gradients past it, usage.

B batch, h w code grid, N vectors, D code dimension, K codes.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqvae import ranks
from vqvae.bottlenecks.nearest import nearest_code
from vqvae.errors import UserError
from vqvae.latent import Latent


class Discrete(nn.Module):
    """What the program asks of a bottleneck of codes beside `forward(features, step) -> Latent`.

    num_codes, code_dim   K, and D as the decoder reads it.
    grid                  (h, w) of its codes. A bottleneck of several codes per position, or of several levels, lays
                          them out as one grid in the order in which they are best predicted; `maps` takes it apart.
    """

    num_codes: int
    code_dim: int
    grid: tuple[int, int]
    stochastic = False  # whether a draw may differ from the mode

    def mode(self, features: Tensor) -> Latent:
        """The latent of the likeliest codes, without noise: what `encode` and reconstructions take."""
        return self(features, 0)

    def embed(self, codes: Tensor) -> Tensor:
        """What the decoder reads, `[B, D, ...]`, of codes `[B, h, w]`."""
        raise NotImplementedError

    def code_vectors(self) -> Tensor:
        """The codebook as a table `[K, D]`, for figures."""
        raise NotImplementedError

    def maps(self, codes: Tensor) -> dict[str, Tensor]:
        """The codes `[B, h, w]` as one named map per level, for figures and counts."""
        return {"codes": codes}

    def usage(self, codes: Tensor) -> Tensor:
        """How often each code of each level occurs, `[levels, K]`."""
        return torch.stack([code_usage(level, self.num_codes) for level in self.maps(codes).values()])

    def prior_context(self) -> dict:
        return {"num_codes": self.num_codes, "grid": self.grid}


class Codebook(nn.Module):
    """K vectors that follow the vectors assigned to them: by EMA, or by the optimiser (1711.00937, appendix A.1).

    EMA: N_k <- decay N_k + (1 - decay) n_k and m_k likewise from the sums of vectors, both zero-debiased, and
    e_k = m_k / N_k with Laplace-smoothed counts (Sonnet's VectorQuantizerEMA). Debiased, the first batch replaces the
    first values altogether, which soft assignments do not survive: nearly uniform ones at the start would draw every
    code to the same mean. With `forgets_start=False` the first values count as much as an average batch, and fade.
    Members of the table of bottlenecks document the options that they pass on.
    """

    def __init__(
        self,
        num_codes: int,
        code_dim: int,
        *,
        learns: str = "ema",
        decay: float = 0.99,
        epsilon: float = 1e-5,
        init: str = "normal",
        revive: float = 0.0,
        unit_norm: bool = False,
        forgets_start: bool = True,
    ):
        super().__init__()
        self.decay, self.epsilon, self.init, self.revive = decay, epsilon, init, revive
        self.learns_by_ema, self.unit_norm, self.forgets_start = learns == "ema", unit_norm, forgets_start
        first = first_codebook(init, num_codes, code_dim)
        first = F.normalize(first, dim=1) if unit_norm else first
        if self.learns_by_ema:
            self.register_buffer("vectors", first)
            self.register_buffer("totals", torch.zeros(num_codes, code_dim))  # m, before debiasing
        else:
            self.vectors = nn.Parameter(first)
        self.register_buffer("counts", torch.zeros(num_codes))  # N, before debiasing
        self.register_buffer("debias", torch.zeros(()))  # 1 - decay^t after t updates

    def table(self) -> Tensor:
        """The vectors `[K, D]` as they are compared and decoded."""
        if self.learns_by_ema or not self.unit_norm:  # an EMA table is kept normalised
            return self.vectors
        # a learnt one is normalised where it is read, so that its gradient is right; a copy of it, because revival
        # may change the vectors before the gradient is computed
        return F.normalize(self.vectors.clone(), dim=1)

    def nearest(self, f: Tensor) -> Tensor:
        """The nearest code `[N]` of each vector `[N, D]`."""
        return nearest_code(f, self.table())

    def embed(self, codes: Tensor) -> Tensor:
        """The vectors `[B, D, h, w]` of codes `[B, h, w]`."""
        return F.embedding(codes, self.table()).movedim(-1, 1)

    @torch.no_grad()
    def initialise(self, vectors: Tensor) -> None:
        """Fit the first vectors to data `[N, D]`, where `init` asks for it."""
        if self.init == "kmeans":
            centres = kmeans_codebook(vectors, len(self.vectors))
            self.vectors.copy_(F.normalize(centres, dim=1) if self.unit_norm else centres)

    @torch.no_grad()
    def learn(self, f: Tensor, codes: Tensor) -> None:
        """Follow a batch of vectors `[N, D]` and their codes `[N]`."""
        sums = torch.zeros_like(self.vectors).index_add_(0, codes, f) if self.learns_by_ema else None
        self.follow(code_usage(codes, len(self.vectors)), sums, f)

    @torch.no_grad()
    def follow(self, n: Tensor, sums: Tensor | None, f: Tensor) -> None:
        """Move the counts by n `[K]` and the running means by sums `[K, D]`; dead codes revive on rows of f."""
        n, sums = ranks.sum_over(n), None if sums is None else ranks.sum_over(sums)
        if not self.forgets_start:
            first = (self.debias == 0).float()
            self.counts.add_(first * n.mean())
            self.debias.add_(first)
            if self.learns_by_ema:
                self.totals.add_(first * n.mean() * self.vectors)
        self.counts.lerp_(n, 1 - self.decay)
        self.debias.lerp_(torch.ones_like(self.debias), 1 - self.decay)
        if self.learns_by_ema:
            self.totals.lerp_(sums, 1 - self.decay)
            total = self.counts.sum()
            extra = self.epsilon * self.debias
            smoothed = (self.counts + extra) / (total + len(self.counts) * extra)
            means = self.totals / (smoothed * total).unsqueeze(1)
            means = F.normalize(means, dim=1) if self.unit_norm else means
            # a code that no vector has ever used keeps its value: debiasing alone would make it the origin
            self.vectors.copy_(torch.where((self.counts > 0).unsqueeze(1), means, self.vectors))
        if self.revive:
            self._revive(f)

    def _revive(self, f: Tensor) -> None:
        average = self.counts.sum() / len(self.counts)
        # a code is judged only once the running counts rest on enough batches (23 with a decay of 0.99)
        dead = (self.counts < self.revive * average) & (self.debias > 0.2)  # [K]
        replacement = f[torch.randint(len(f), (len(self.counts),), device=f.device)]  # [K, D]
        replacement = ranks.broadcast(replacement)
        self.vectors.copy_(torch.where(dead.unsqueeze(1), replacement, self.vectors))
        # count and mean start afresh too, else the next update would drag the code back; the small count lets the
        # code follow its first vectors quickly, and lets it move again soon if none comes
        fresh = 2 * self.revive * average
        self.counts.copy_(torch.where(dead, fresh, self.counts))
        if self.learns_by_ema:
            self.totals.copy_(torch.where(dead.unsqueeze(1), replacement * fresh, self.totals))


def check_options(name: str, **ranges: tuple[float, float, float]) -> None:
    """Refuse an option of `--bottleneck name` outside its range, each given as (value, least, most)."""
    for option, (value, low, high) in ranges.items():
        if not low <= value <= high:
            limit = f"at least {low:g}" if high in (math.inf, 2**31) else f"from {low:g} to {high:.9g}"
            raise UserError(f"--bottleneck {name}: {option}={value} is out of range, it must be {limit}")


def vectors_of(features: Tensor) -> Tensor:
    """`[B, D, h, w]` as rows `[N, D]`, N = B h w."""
    return features.movedim(1, -1).reshape(-1, features.shape[1])


@torch.no_grad()
def standardise(projection: nn.Conv2d, features: Tensor) -> None:
    """Scale and shift a projection so that each of its channels has mean 0 and variance 1 over features `[N, C, h, w]`.

    Fixed grids of codes need it (1602.07868, section 3, does it for every layer): from the encoders' first features,
    which are small, all vectors would get one code, that of the origin, which a decoder may pass no gradient for.
    """
    std, mean = torch.std_mean(ranks.gather_rows(vectors_of(projection(features))), dim=0)
    std = std.clamp(min=1e-6)
    projection.weight.div_(std.view(-1, 1, 1, 1))
    projection.bias.sub_(mean).div_(std)


def straight_through(z: Tensor, quantised: Tensor) -> Tensor:
    """The quantised value, with the gradient of the identity: dL/dz := dL/dquantised (1711.00937, section 3.2)."""
    return z + (quantised - z).detach()


def rotate_to(z: Tensor, quantised: Tensor) -> Tensor:
    """The quantised value, with the gradient of the rotation and scaling that take z there (2410.06424, section 4.2).

    Of vectors along dimension 1, with u and q their unit vectors and w that of u + q: dL/dz := s R^T dL/dquantised,
    where s = ||quantised|| / ||z|| and R = I - 2 w w^T + 2 q u^T is the rotation of u onto q, all three constants.
    So the angle between gradient and vector survives, and vectors of one code get different gradients.
    """
    f, e = z.detach(), quantised.detach()
    norm = f.norm(dim=1, keepdim=True)
    u, q = F.normalize(f, dim=1), F.normalize(e, dim=1)
    # of opposite vectors w is 0 and R the reflection I - 2 u u^T; the bound keeps rounding errors from giving w a
    # direction when they nearly are
    w = F.normalize(u + q, dim=1, eps=1e-6)
    along_w, along_u = ((z * v).sum(dim=1, keepdim=True) for v in (w, u))
    scale = e.norm(dim=1, keepdim=True) / norm.clamp(min=1e-6)
    mapped = scale * (z - 2 * along_w * w + 2 * along_u * q)
    mapped = torch.where(norm > 1e-6, mapped, z)  # the origin has no direction to rotate: straight through
    return e + (mapped - mapped.detach())


GRADIENTS = {"straight-through": straight_through, "rotation": rotate_to}


def entropy(p: Tensor) -> Tensor:
    """Nats of a distribution `[..., K]`, with a finite gradient also where a probability is 0."""
    return -(p * p.clamp(min=torch.finfo(p.dtype).tiny).log()).sum(dim=-1)


def soft_usage(f: Tensor, codebook: Tensor, temperature: float) -> Tensor:
    """Mean over f `[N, D]` of softmax_k(-||f_n - e_k||^2 / temperature), `[K]`; ||f_n||^2 is the same for every k."""
    return ((2 * f @ codebook.T - codebook.square().sum(dim=1)) / temperature).softmax(dim=1).mean(dim=0)


def code_usage(codes: Tensor, num_codes: int) -> Tensor:
    """How often each code occurs among codes of any shape, `[K]` float32."""
    codes = codes.flatten()  # no bincount: on a GPU it waits for the device
    ones = torch.ones(len(codes), device=codes.device)
    return torch.zeros(num_codes, device=codes.device).index_add_(0, codes, ones)


def perplexity(usage: Tensor) -> Tensor:
    """exp(-sum p log p) of usage counts or shares `[..., K]`: how many codes, equally used, would be as varied.

    The mean over levels, where there are several.
    """
    share = usage.float() / usage.float().sum(dim=-1, keepdim=True).clamp(min=1e-12)
    return torch.special.entr(share).sum(dim=-1).exp().mean()


def first_codebook(init: str, num_codes: int, code_dim: int) -> Tensor:
    """A codebook `[K, D]` before any data: `uniform` in ±1/K, `fan-in` uniform in ±sqrt(3/D), else N(0, 1)."""
    limit = {"uniform": 1 / num_codes, "fan-in": math.sqrt(3 / code_dim)}.get(init)
    if limit is None:
        return torch.randn(num_codes, code_dim)
    return torch.empty(num_codes, code_dim).uniform_(-limit, limit)


def kmeans_codebook(vectors: Tensor, num_codes: int) -> Tensor:
    """K centres `[K, D]` of vectors `[N, D]` by k-means++ and ten Lloyd iterations (scikit-learn), seeded by torch.

    Of several processes one fits, on the vectors of all, and the others get its centres. With fewer distinct vectors
    than codes, vectors are repeated with a jitter of 1% of their spread.
    """
    vectors = ranks.gather_rows(vectors)
    first = ranks.rank() == 0
    return ranks.broadcast(_kmeans(vectors, num_codes) if first else vectors.new_empty(num_codes, vectors.shape[1]))


def _kmeans(vectors: Tensor, num_codes: int) -> Tensor:
    from sklearn.cluster import KMeans

    seed = int(torch.randint(2**31, ()))
    points = vectors.detach().float().cpu()
    if len(points) < num_codes:
        repeats = points[torch.randint(len(points), (num_codes - len(points),))]
        points = torch.cat([points, repeats + 0.01 * points.std() * torch.randn_like(repeats)])
    kmeans = KMeans(num_codes, init="k-means++", n_init=1, max_iter=10, random_state=seed, algorithm="lloyd")
    kmeans.fit(points.numpy())
    return torch.from_numpy(kmeans.cluster_centers_).to(vectors)
