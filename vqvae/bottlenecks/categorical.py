"""Bottlenecks with a categorical posterior over the codes: deterministic, categorical and Gumbel-Softmax.

All three put a distribution over the K codes at every position and hand on w E, with w a point of the simplex and E
the codebook; they differ in how w is drawn while training. In evaluation w is a single hard draw, whose log
probability is exact, and `mode` takes the likeliest code.

B batch, S samples, D code dimension, K codes, h w code grid, L = h w positions.
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqvae.bottlenecks.codebook import Codebook, Discrete, check_options, standardise, straight_through, vectors_of
from vqvae.errors import UserError
from vqvae.flows import SimplexFlow
from vqvae.latent import Latent
from vqvae.schedules import Schedule


class Assigning(Discrete):
    """q(k|x) = softmax_k(-||f - e_k||) at every position, or softmax of a 1x1 convolution of the features.

    With distances, the codebook learns by EMA from the assignments averaged over samples; with a convolution
    (`posterior=linear`) by gradient, through w E. Loss: beta * mean (f - sg w E)^2, with distances alone.
    """

    name: str
    stochastic = True  # a draw is not the mode

    def __init__(
        self,
        *,
        channels: int,
        grid: tuple,
        num_codes: int,
        code_dim: int,
        beta: float,
        posterior: str,
        decay: float,
        epsilon: float,
        init: str,
        revive: float,
        num_samples: int = 1,
        iaf_flows: int = 0,
        iaf_parameters: str = "transformer",
    ):
        super().__init__()
        check_options(
            self.name,
            num_codes=(num_codes, 2, 2**31),
            code_dim=(code_dim, 1, 2**31),
            beta=(beta, 0, math.inf),
            decay=(decay, 0, 1 - 1e-9),
            epsilon=(epsilon, 0, math.inf),
            revive=(revive, 0, 1),
            num_samples=(num_samples, 1, 2**31),
            iaf_flows=(iaf_flows, 0, 2**31),
        )
        self.num_codes, self.code_dim, self.grid = num_codes, code_dim, tuple(grid)
        self.beta, self.num_samples, self.by_distance = beta, num_samples, posterior == "distance"
        if self.by_distance:
            same = channels == code_dim
            self.projection: nn.Module = nn.Identity() if same else nn.Conv2d(channels, code_dim, 1)
        else:
            self.projection = nn.Conv2d(channels, num_codes, 1)
        self.codebook = Codebook(
            num_codes,
            code_dim,
            learns="ema" if self.by_distance else "gradient",
            decay=decay,
            epsilon=epsilon,
            init=init if self.by_distance else "normal",
            revive=revive if self.by_distance else 0.0,
            forgets_start=False,
        )
        positions = math.prod(self.grid)
        self.flows = nn.ModuleList(
            SimplexFlow(positions, num_codes, parameters=iaf_parameters) for _ in range(iaf_flows)
        )

    @torch.no_grad()
    def initialise(self, features: Tensor) -> None:
        if self.by_distance:
            if isinstance(self.projection, nn.Conv2d):
                standardise(self.projection, features)
            self.codebook.initialise(vectors_of(self.projection(features)))

    def embed(self, codes: Tensor) -> Tensor:
        return self.codebook.embed(codes)

    def code_vectors(self) -> Tensor:
        return self.codebook.table()

    def logits(self, features: Tensor, table: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits `[B, h, w, K]` of the posterior, and with distances the vectors `[B, h, w, D]` they are of."""
        f = self.projection(features).movedim(1, -1)
        if not self.by_distance:
            return f, None
        distances = torch.cdist(f.reshape(1, -1, self.code_dim), table[None])
        return -distances.view(*f.shape[:-1], self.num_codes), f

    def mode(self, features: Tensor) -> Latent:
        """The likeliest code of every position, without noise: what `encode` and reconstructions take."""
        f = self.projection(features)
        by_distance = self.by_distance
        codes = self.codebook.nearest(vectors_of(f)).view(len(f), *f.shape[2:]) if by_distance else f.argmax(1)
        return Latent.of_codes(codes)._replace(z=self.embed(codes))

    def forward(self, features: Tensor, step: int) -> Latent:
        table = self.codebook.table()
        if self.training and self.codebook.learns_by_ema:
            table = table.clone()  # what the gradient is of, when the EMA has moved the codebook on
        logits, f = self.logits(features, table)
        log_p = logits.log_softmax(-1)
        if not self.training:
            return self._hard_draw(log_p)
        w, log_q = self.assign(log_p, step)  # [S, B, h, w, K], [S, B]
        for flow in self.flows:
            w, log_det = flow(w.flatten(0, 1).flatten(1, 2))  # on [S*B, L, K]
            w = w.view(-1, *log_p.shape)
            log_q = log_q - self.volume_change * log_det.view(len(w), -1)
        z = w @ table  # [S, B, h, w, D]
        entropy = -log_q.detach() if self.exact else _entropy(log_p.detach()).sum((1, 2))
        loss, stats = z.new_zeros(()), {"posterior_entropy": entropy.mean()}
        if f is not None:
            commitment = (f - z.detach()).square().mean()
            loss, stats = self.beta * commitment, stats | {"commitment": commitment.detach()}
            self._learn(f.detach().flatten(0, 2), w.detach().mean(0).flatten(0, 2))
        w = w.flatten(0, 1)  # [S*B, h, w, K]
        return Latent(
            z.flatten(0, 1).movedim(-1, 1),
            w.detach().argmax(-1),
            log_q=log_q.flatten(),
            loss=loss,
            stats=stats,
            assignments=w.movedim(-1, 1),
        )

    # log q(w') of a flow's output: a map of finitely many points has no volume change, one of densities has
    volume_change = 0.0
    exact = False  # whether log q in training is its mean over draws, -H(q), in place of a draw's own

    def assign(self, log_p: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Training's assignments `[S, B, h, w, K]` and their log q `[S, B]`, given log p `[B, h, w, K]`."""
        raise NotImplementedError

    def _hard_draw(self, log_p: Tensor) -> Latent:
        # flows map the corners of the simplex to themselves, so that hard draws need none
        codes = _draw(log_p, 1)[0]
        log_q = log_p.gather(-1, codes.unsqueeze(-1)).flatten(1).sum(1)
        stats = {"posterior_entropy": _entropy(log_p).sum((1, 2)).mean()}
        return Latent(self.embed(codes), codes, log_q=log_q, loss=log_q.new_zeros(()), stats=stats)

    def _learn(self, rows: Tensor, w: Tensor) -> None:
        """EMA from soft assignments w `[N, K]` of vectors `[N, D]`."""
        self.codebook.follow(w.sum(0), w.T @ rows, rows)


class Deterministic(Assigning):
    """The nearest code, its gradient that of the softmax: w = one-hot(argmin d), straight through softmax(-d).

    Experiment 1 of the probabilistic VQ-VAEs: unlike `vq`, whose gradient is the identity's on the vector, here it
    reaches the encoder through the distances to all codes. The posterior is a point, so log q = 0.

    num_codes, code_dim   K and D; a 1x1 convolution maps the features to D channels where their number differs.
    beta                  commitment: how hard the encoder is pulled to its codes.
    decay, epsilon        of the EMA codebook.
    init, revive          as for vq. The convolution starts such that the first features have variance 1: small ones
                          would be at nearly one distance from all codes, and the posterior might never leave the
                          uniform. Where there is none, init=normal gives codes room to differ.
    """

    name = "deterministic"
    stochastic = False

    def __init__(
        self,
        *,
        channels: int,
        grid: tuple,
        num_codes: int = 64,
        code_dim: int = 16,
        beta: float = 0.25,
        decay: float = 0.99,
        epsilon: float = 1e-5,
        init: Literal["kmeans", "uniform", "fan-in", "normal"] = "kmeans",
        revive: float = 0.03,
    ):
        super().__init__(
            channels=channels, grid=grid, num_codes=num_codes, code_dim=code_dim, beta=beta, posterior="distance",
            decay=decay, epsilon=epsilon, init=init, revive=revive,
        )  # fmt: skip

    def assign(self, log_p: Tensor, step: int) -> tuple[Tensor, Tensor]:
        w = F.one_hot(log_p.argmax(-1), self.num_codes).to(log_p.dtype)
        return straight_through(log_p.exp(), w)[None], log_p.new_zeros(1, len(log_p))

    def _hard_draw(self, log_p: Tensor) -> Latent:
        codes = log_p.argmax(-1)
        return Latent.of_codes(codes)._replace(z=self.embed(codes))


class Categorical(Assigning):
    """Codes drawn from the posterior, straight through softmax(-d) (soft EM: 1805.11063, section 3).

    Averaged, w is the mean of the samples' one-hots and log q the multinomial log probability of their counts; not
    averaged, every sample is decoded by itself. Published: sum p dL/dw, no score-function term for the draw itself.

    num_codes, code_dim   K and D; a 1x1 convolution maps the features to D channels where their number differs.
    num_samples           draws per position in training; evaluation takes one.
    average_samples       decode their mean, or each.
    posterior             distance: softmax(-||f - e_k||), EMA codebook; linear: a 1x1 convolution to K logits, and a
                          codebook that learns by gradient.
    iaf_flows             flows on the simplex after the draw; iaf_parameters: where their scales come from.
    beta, decay, epsilon, init, revive   as for deterministic.
    """

    name = "categorical"

    def __init__(
        self,
        *,
        channels: int,
        grid: tuple,
        num_codes: int = 64,
        code_dim: int = 16,
        num_samples: int = 10,
        average_samples: bool = True,
        beta: float = 0.25,
        posterior: Literal["distance", "linear"] = "distance",
        decay: float = 0.99,
        epsilon: float = 1e-5,
        init: Literal["kmeans", "uniform", "fan-in", "normal"] = "kmeans",
        revive: float = 0.03,
        iaf_flows: int = 0,
        iaf_parameters: Literal["transformer", "triangular"] = "transformer",
    ):
        super().__init__(
            channels=channels, grid=grid, num_codes=num_codes, code_dim=code_dim, beta=beta, posterior=posterior,
            decay=decay, epsilon=epsilon, init=init, revive=revive, num_samples=num_samples, iaf_flows=iaf_flows,
            iaf_parameters=iaf_parameters,
        )  # fmt: skip
        self.average_samples = average_samples

    def assign(self, log_p: Tensor, step: int) -> tuple[Tensor, Tensor]:
        codes = _draw(log_p, self.num_samples)  # [S, B, h, w]
        if self.average_samples:
            ones = torch.ones_like(codes, dtype=log_p.dtype).movedim(0, -1)
            counts = torch.zeros_like(log_p).scatter_add_(-1, codes.movedim(0, -1), ones)[None]
            w = counts / self.num_samples
            log_q = math.lgamma(self.num_samples + 1) - (counts + 1).lgamma().sum(-1) + (counts * log_p).sum(-1)
        else:
            w = F.one_hot(codes, self.num_codes).to(log_p.dtype)
            log_q = log_p.expand_as(w).gather(-1, codes.unsqueeze(-1)).squeeze(-1)
        return straight_through(log_p.exp().expand_as(w), w), log_q.flatten(2).sum(2)


class Gumbel(Assigning):
    """Relaxed draws: w = softmax((log p + Gumbel noise) / temperature), 1611.01144 eq. 2 and 1611.00712.

    log q of a relaxed draw is approximated by sum_k w_k log p_k, which is exact at the corners of the simplex. The
    mean of the bound's KL term can be had exactly instead: entropy=exact takes sum_k p_k log p_k (DALL-E's KL to a
    uniform prior, 2102.12092, section 2.1, with --prior uniform).

    num_codes, code_dim   K and D; a 1x1 convolution maps the features to D channels where their number differs.
    temperature           a number, or a schedule such as quarter-cosine:1:0.0625:150000.
    hard                  decode the one-hot of the largest w, straight through w.
    num_samples           draws per position in training, each decoded by itself; evaluation takes one, hard.
    posterior             distance: softmax(-||f - e_k||), EMA codebook; linear: a 1x1 convolution to K logits, and a
                          codebook that learns by gradient (DALL-E, deep-vector-quantization).
    entropy               log q in training: draw, or exact.
    iaf_flows             flows on the simplex after the draw; iaf_parameters: where their scales come from.
    beta, decay, epsilon, init, revive   as for deterministic.
    """

    name = "gumbel"
    volume_change = 1.0

    def __init__(
        self,
        *,
        channels: int,
        grid: tuple,
        total_steps: int,
        num_codes: int = 64,
        code_dim: int = 16,
        temperature: str = "0.5",
        hard: bool = False,
        num_samples: int = 1,
        beta: float = 0.25,
        posterior: Literal["distance", "linear"] = "distance",
        entropy: Literal["draw", "exact"] = "draw",
        decay: float = 0.99,
        epsilon: float = 1e-5,
        init: Literal["kmeans", "uniform", "fan-in", "normal"] = "kmeans",
        revive: float = 0.03,
        iaf_flows: int = 0,
        iaf_parameters: Literal["transformer", "triangular"] = "transformer",
    ):
        super().__init__(
            channels=channels, grid=grid, num_codes=num_codes, code_dim=code_dim, beta=beta, posterior=posterior,
            decay=decay, epsilon=epsilon, init=init, revive=revive, num_samples=num_samples, iaf_flows=iaf_flows,
            iaf_parameters=iaf_parameters,
        )  # fmt: skip
        self.temperature = Schedule.parse("--bottleneck gumbel temperature", temperature)
        self.total_steps, self.hard, self.exact = total_steps, hard, entropy == "exact"
        if min(value for piece in self.temperature.pieces for value in (piece.start, piece.end)) <= 0:
            raise UserError(f"--bottleneck gumbel: temperature={temperature} must stay above 0")
        if self.exact and iaf_flows:
            raise UserError("--bottleneck gumbel: entropy=exact is of the draw before any flow; use entropy=draw")

    def assign(self, log_p: Tensor, step: int) -> tuple[Tensor, Tensor]:
        # Gumbel noise is -log(-log u); torch's own exponential draws, -log u, take a CPU four times as long
        uniform = torch.rand(self.num_samples, *log_p.shape, device=log_p.device)
        minus_noise = uniform.clamp_(min=torch.finfo(uniform.dtype).tiny).log_().neg_().log_()
        relaxed = ((log_p - minus_noise) / self.temperature(step, self.total_steps)).softmax(-1)  # [S, B, h, w, K]
        relaxed = relaxed.clamp(1e-6, 1 - 1e-6)
        w = relaxed
        if self.hard:
            one_hot = F.one_hot(relaxed.argmax(-1), self.num_codes).to(log_p.dtype)
            w = straight_through(relaxed, one_hot)
        if self.exact:
            return w, -_entropy(log_p).sum((1, 2)).expand(self.num_samples, -1)
        return w, (w * log_p).flatten(2).sum(2)


@torch.no_grad()
def _draw(log_p: Tensor, samples: int) -> Tensor:
    """Codes `[S, ...]` of log probabilities `[..., K]`, by inverting the distribution function at uniform numbers.

    What torch draws it checks first, for which the host waits for the device.
    """
    cumulative = log_p.exp().cumsum(-1)
    reached = torch.rand(*log_p.shape[:-1], samples, device=log_p.device) * cumulative[..., -1:]
    codes = torch.searchsorted(cumulative, reached, right=True)
    return codes.clamp(max=log_p.shape[-1] - 1).movedim(-1, 0)


def _entropy(log_p: Tensor) -> Tensor:
    """Nats, of log probabilities `[..., K]`."""
    return -(log_p.exp() * log_p).sum(-1)
