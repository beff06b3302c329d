"""A codebook, how it starts and how it is updated.

B batch, h w code grid, N vectors, D code dimension, K codes.
"""

import math
import warnings
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqvae import distributed, shares
from vqvae.bottlenecks.base import CodeOptions, Projection
from vqvae.bottlenecks.nearest import nearest_code
from vqvae.contracts import count_codes
from vqvae.registry import Range


@dataclass(frozen=True, kw_only=True)
class EMAOptions(CodeOptions):
    """Options of a codebook of running means."""

    decay: Annotated[float, Range(0, below=1), "decay of the running means and counts"] = 0.99
    epsilon: Annotated[float, Range(0), "Laplace smoothing of the running counts"] = 1e-5
    init: Annotated[
        Literal["kmeans", "uniform", "fan-in", "normal"],
        "first codebook: k-means++ of the first features, uniform in ±1/K or ±sqrt(3/D) (Sonnet's), or N(0, 1)",
    ] = "kmeans"
    revive: Annotated[
        float, Range(0, 1), "share of the average usage below which a code moves onto a vector of the batch; 0: never"
    ] = 0.03

    def decay_at(self, step: int) -> float:
        """The decay in a training step."""
        return self.decay

    @property
    def start_vectors(self) -> int:
        """How many vectors the start needs: none, unless k-means fits the codes to them."""
        return enough_vectors(self.num_codes) if self.init == "kmeans" else 0


@dataclass(frozen=True, kw_only=True)
class CodebookOptions(EMAOptions):
    """Options of a codebook that is learned by EMA or by gradient."""

    init: Annotated[
        Literal["kmeans", "uniform", "fan-in", "normal"],
        "first codebook: k-means++ of the first features, uniform in ±1/K, uniform in ±sqrt(3/D) with the first "
        "weights of the projection as in Sonnet, or N(0, 1)",
    ] = "kmeans"
    beta: Annotated[float, Range(0), "weight of the commitment loss"] = 0.25
    warmup: Annotated[
        bool, "start with a decay of 0.1 that rises to `decay`, so that the codes keep up with the first features"
    ] = True
    codebook: Annotated[
        Literal["ema", "gradient"], "update of the codes: running means of their vectors, or the optimizer"
    ] = "ema"
    spread: Annotated[
        float, Range(0), "standard deviation to which init=kmeans scales the projected features first; 0: leaves them"
    ] = 0.5

    def decay_at(self, step: int) -> float:
        return min(self.decay, (1 + step) / (10 + step)) if self.warmup else self.decay

    def idle(self) -> dict[str, str]:
        needs = super().idle()
        if self.init != "kmeans":
            needs["spread"] = "init=kmeans"
        if self.codebook == "gradient":
            needs["epsilon"] = "codebook=ema"
            if not self.revive:  # revival needs the running counts
                needs |= dict.fromkeys(("decay", "warmup"), "codebook=ema or revive above 0")
        return needs

    def start(self, projection: nn.Module) -> None:
        """Give the projection Sonnet's first weights, if the codebook has Sonnet's first vectors."""
        if self.init == "fan-in" and isinstance(projection, Projection):
            projection.start_as_sonnet()

    def prepare(self, projection: nn.Module, features: Tensor) -> None:
        """Standardize the projection's output over features `[B, channels, h, w]`, if k-means will fit the codes to it.

        The first features are small and soon grow: codes fitted to them would be far from the next ones, and die.
        """
        if self.init == "kmeans" and self.spread and isinstance(projection, Projection):
            projection.standardize(features, self.spread)


class Codebook(nn.Module):
    """K vectors of D dimensions, updated by EMA or trained by the optimizer (1711.00937, appendix A.1).

    EMA (Sonnet's VectorQuantizerEMA): N_k <- decay N_k + (1 - decay) n_k, where n_k counts the batch's vectors with
    code k; m_k <- decay m_k + (1 - decay) s_k, where s_k is their sum; e_k = m_k / N_k, with Laplace-smoothed counts.
    With `warmup`, step t has the decay min(decay, (1 + t) / (10 + t)): the first features change fast, and a codebook
    that averages over all of them would soon be far from all but a few.

    `forgets_start=True` debiases both means for their start at zero, so that the first batch replaces the first
    vectors. Soft assignments need `forgets_start=False`: they are nearly uniform at first and would give all codes
    the same mean. The first vectors then count as much as an average batch, and fade.
    """

    vectors: Tensor  # [K, D]
    totals: Tensor  # [K, D], m before debiasing; only with EMA
    counts: Tensor  # [K], N before debiasing
    debias: Tensor  # scalar, 1 minus the product of the decays so far

    def __init__(
        self,
        options: EMAOptions,
        dim: int,
        *,
        learns: str = "ema",
        unit_norm: bool = False,
        forgets_start: bool = True,
    ):
        super().__init__()
        self.options, self.unit_norm, self.forgets_start = options, unit_norm, forgets_start
        self.learns_by_ema = learns == "ema"
        first = first_codebook(options.init, options.num_codes, dim)
        first = F.normalize(first, dim=1) if unit_norm else first
        if self.learns_by_ema:
            self.register_buffer("vectors", first)
            self.register_buffer("totals", torch.zeros_like(first))
        else:
            self.vectors = nn.Parameter(first)
        self.register_buffer("counts", torch.zeros(options.num_codes))
        self.register_buffer("debias", torch.zeros(()))

    def table(self) -> Tensor:
        """The vectors `[K, D]` to compare with and to decode."""
        if self.learns_by_ema or not self.unit_norm:  # EMA updates normalize the stored vectors
            return self.vectors
        # The optimizer's vectors are normalized here, for the right gradient. Cloned, because revival may change the
        # vectors before the gradient is computed.
        return F.normalize(self.vectors.clone(), dim=1)

    def nearest(self, f: Tensor) -> Tensor:
        """The nearest codes `[N]` of vectors `[N, D]`."""
        return nearest_code(f, self.table())

    def embed(self, codes: Tensor) -> Tensor:
        """The vectors `[B, D, h, w]` of codes `[B, h, w]`."""
        return F.embedding(codes, self.table()).movedim(-1, 1)

    @torch.no_grad()
    def initialize(self, vectors: Tensor) -> None:
        """Fit the first codebook to vectors `[N, D]`, if `init` asks for it."""
        if self.options.init == "kmeans":
            centers = kmeans_codebook(vectors, len(self.vectors))
            self.vectors.copy_(F.normalize(centers, dim=1) if self.unit_norm else centers)

    @torch.no_grad()
    def update(self, f: Tensor, codes: Tensor, step: int) -> None:
        """Update from vectors `[N, D]` and their codes `[N]`."""
        sums = torch.zeros_like(self.vectors).index_add_(0, codes, f) if self.learns_by_ema else None
        self.ema_update(count_codes(codes, len(self.vectors)), sums, f, step)

    @torch.no_grad()
    def ema_update(self, n: Tensor, sums: Tensor | None, f: Tensor, step: int) -> None:
        """Update the running counts by n `[K]` and the running means by sums `[K, D]`, then revive dead codes.

        `sums` is overwritten; it is None if the optimizer trains the vectors. f `[N, D]` are the vectors onto which
        dead codes may move. A batch with sums that are not finite counts for nothing.

        Raises ValueError in half precision, in which a running mean loses its small steps.
        """
        if self.counts.dtype.itemsize < 4:
            raise ValueError("a codebook in half precision cannot be trained; float() the layer: it takes all inputs")
        n = n.to(self.counts)  # of a model in float64
        revived = shares.pick(f, len(self.counts)) if self.options.revive else f[:0]
        of_batch = shares.collect(n, f[:0] if sums is None else sums, revived)
        if of_batch is None:  # the batch has more shares, the last of which updates
            return
        n, sums, revived = of_batch[0], None if sums is None else of_batch[1], of_batch[2]
        if sums is not None:  # NaN, such as from an overflow in fp16, would stay in the means for good
            spoiled = ~sums.sum().isfinite()
            n, sums = n.masked_fill(spoiled, 0), sums.masked_fill_(spoiled, 0)
        decay = self.options.decay_at(step)
        if not self.forgets_start:
            first = (self.debias == 0).float()
            self.counts.add_(first * n.mean())
            self.debias.add_(first)
            if sums is not None:
                self.totals.add_(first * n.mean() * self.vectors)
        self.counts.lerp_(n, 1 - decay)
        self.debias.lerp_(torch.ones_like(self.debias), 1 - decay)
        if sums is not None:
            self.totals.lerp_(sums, 1 - decay)
            total = self.counts.sum()
            extra = self.options.epsilon * self.debias
            smoothed = (self.counts + extra) / (total + len(self.counts) * extra)
            means = torch.div(self.totals, (smoothed * total).unsqueeze(1), out=sums)
            means = F.normalize(means, dim=1) if self.unit_norm else means
            # a code without vectors so far keeps its value: its mean is 0
            torch.where((self.counts > 0).unsqueeze(1), means, self.vectors, out=self.vectors)
        if self.options.revive:
            self._revive(revived, decay)

    def _revive(self, replacement: Tensor, decay: float) -> None:
        """Move dead codes onto `replacement`, random vectors of the batch `[K, D]`."""
        average = self.counts.sum() / len(self.counts)
        # Counts are judged only after enough batches (23 with a decay of 0.99), and only if the last 1 / (1 - decay)
        # batches have at least one vector for every two codes.
        judged = (self.debias > 0.2) & (average > (1 - decay) / 2)
        dead = (self.counts < self.options.revive * average) & judged & replacement.isfinite().all(dim=1)  # [K]
        torch.where(dead.unsqueeze(1), replacement, self.vectors, out=self.vectors)
        # Without a new mean and count the next update would undo the move. With a small count the code adapts to its
        # first vectors quickly, and is soon dead again if it gets none.
        fresh = 2 * self.options.revive * average
        torch.where(dead, fresh, self.counts, out=self.counts)
        if self.learns_by_ema:
            torch.where(dead.unsqueeze(1), replacement * fresh, self.totals, out=self.totals)


def first_codebook(init: str, num_codes: int, code_dim: int) -> Tensor:
    """A codebook `[K, D]` before any data: `uniform` in ±1/K, `fan-in` uniform in ±sqrt(3/D), otherwise N(0, 1)."""
    limit = {"uniform": 1 / num_codes, "fan-in": math.sqrt(3 / code_dim)}.get(init)
    if limit is None:
        return torch.randn(num_codes, code_dim)
    return torch.empty(num_codes, code_dim).uniform_(-limit, limit)


def kmeans_codebook(vectors: Tensor, num_codes: int) -> Tensor:
    """K centers `[K, D]` of vectors `[N, D]`, by k-means (scikit-learn), seeded by torch.

    k-means++ and ten Lloyd iterations; from 8,192 codes on, mini-batches that start at random vectors, with a progress
    bar; from 92,682 codes on, random vectors. The first process fits the vectors of all processes and sends them the
    centers. If there are fewer different vectors than codes, they are repeated with a jitter of 1% of their standard
    deviation, so that no two centers are equal.
    """
    vectors = distributed.gather_rows(vectors)
    if distributed.rank() > 0:
        return distributed.broadcast(vectors.new_empty(num_codes, vectors.shape[1]))
    seed = int(torch.randint(2**31, ()))
    points = vectors.detach().float().cpu()
    if len(points) < num_codes:
        points = _with_jittered_copies(points, num_codes)
    fit = _minibatch_kmeans if num_codes >= MANY_CODES else _kmeans
    centers = fit(points, num_codes, seed)
    distinct = centers.unique(dim=0)
    if len(distinct) < num_codes:
        centers = _with_jittered_copies(distinct, num_codes)
    return distributed.broadcast(centers.to(vectors))


MANY_CODES = 8192  # for which k-means++ takes minutes
MOST_DISTANCES = 2**33  # that mini-batches compute: half a minute on two cores


def enough_vectors(num_codes: int) -> int:
    """How many vectors k-means should get: 20,000, or four per code as far as it uses them."""
    return max(20_000, min(4 * num_codes, MOST_DISTANCES // num_codes))


def _with_jittered_copies(points: Tensor, count: int) -> Tensor:
    """Extend points `[N, D]` to `count` rows with jittered copies of random ones."""
    repeats = points[torch.randint(len(points), (count - len(points),))]
    std = points.std(correction=min(1, points.numel() - 1))  # a single number varies by 0
    return torch.cat([points, repeats + 0.01 * torch.where(std > 0, std, 1.0) * torch.randn_like(repeats)])


def _kmeans(points: Tensor, num_codes: int, seed: int) -> Tensor:
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning
    from threadpoolctl import threadpool_limits

    kmeans = KMeans(num_codes, init="k-means++", n_init=1, max_iter=10, random_state=seed, algorithm="lloyd")
    # The threads' sums are added in the order in which they are ready, which changes the result from three threads on.
    threads = min(2, torch.get_num_threads())
    with warnings.catch_warnings(), threadpool_limits(threads, user_api="openmp"):
        warnings.simplefilter("ignore", ConvergenceWarning)  # of fewer distinct vectors than codes
        kmeans.fit(points.numpy())
    return torch.from_numpy(kmeans.cluster_centers_)


def _minibatch_kmeans(points: Tensor, num_codes: int, seed: int) -> Tensor:
    from sklearn.cluster import MiniBatchKMeans
    from tqdm import tqdm

    start = points[torch.randperm(len(points))[:num_codes]]
    kmeans = MiniBatchKMeans(num_codes, init=start.numpy(), n_init=1, random_state=seed, reassignment_ratio=0)
    batch = max(8192, num_codes)  # scikit-learn takes no fewer than num_codes
    order = torch.cat([torch.randperm(len(points)) for _ in range(2)])[: MOST_DISTANCES // num_codes]
    for index in tqdm(order.split(batch), desc="k-means", unit="batch", leave=False, disable=None):
        if len(index) >= num_codes:
            kmeans.partial_fit(points[index].numpy())
    return torch.from_numpy(getattr(kmeans, "cluster_centers_", start.numpy()))
