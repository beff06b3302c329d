"""Bottlenecks with a categorical posterior over codes: deterministic, categorical and Gumbel-Softmax.

At every position they have a distribution over K codes. The decoder's input is w E, where E is the codebook and w a
point of the simplex. They differ in how they draw w in training. In evaluation w is one hard draw with its exact log
probability. `quantize` takes the most likely code.

B batch, S samples, D code dimension, K codes, h w code grid, L = h w positions, sg stop-gradient.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqvae import shares
from vqvae.bottlenecks.base import Projection, vectors_of
from vqvae.bottlenecks.codebook import Codebook, EMAOptions, enough_vectors
from vqvae.bottlenecks.gradients import straight_through
from vqvae.contracts import Discrete, Latent
from vqvae.errors import OptionError
from vqvae.flows import SimplexFlow
from vqvae.registry import Count, Range
from vqvae.schedules import Schedule, ScheduleText


@dataclass(frozen=True, kw_only=True)
class PosteriorOptions(EMAOptions):
    num_codes: Annotated[int, Range(2, 2**31 - 1), "codebook size K"] = 64
    code_dim: Annotated[Count, "code dimension D"] = 16


@dataclass(frozen=True, kw_only=True)
class SampledOptions(PosteriorOptions):
    num_samples: Annotated[Count, "draws per position in training; evaluation takes one"] = 10
    posterior: Annotated[
        Literal["distance", "linear"],
        "softmax of -||f - e_k|| (EMA codebook), or of a 1x1 convolution (codebook trained by gradient)",
    ] = "distance"
    iaf_flows: Annotated[int, Range(0), "flows on the simplex after the draw"] = 0
    iaf_parameters: Annotated[Literal["transformer", "triangular"], "source of the flows' scales"] = "transformer"

    def idle(self) -> dict[str, str]:
        needs = super().idle()
        if not self.iaf_flows:
            needs["iaf_parameters"] = "iaf_flows above 0"
        if self.posterior == "linear":  # the optimizer trains the codebook, without a loss of its own
            needs |= dict.fromkeys(("beta", "init", "revive", "decay", "epsilon"), "posterior=distance")
        return needs


class CategoricalPosterior(Discrete):
    """q(k|x) = softmax_k(-||f - e_k||) at every position, or the softmax of a 1x1 convolution of the features.

    With distances the codebook is updated by EMA from the assignments, averaged over samples, and the loss is
    beta * mean (f - sg w E)^2. With a convolution (`posterior=linear`) the codebook is trained by gradient through
    w E, without a loss.

    With distances, a 1x1 convolution projects features that do not have D channels, and starts such that the first
    vectors have variance 1. Small vectors are about equally far from all codes, and the posterior may stay uniform.
    Features with D channels are not projected; there, init=normal separates the codes.
    """

    options: SampledOptions
    stochastic = True
    exact = False  # whether training replaces log q of the draw by its mean over draws, -H(q)
    scored = False  # whether the objective adds the score-function gradient of the draws
    volume_change = 0.0  # 1 if w has a density, which flows change; 0 if w takes finitely many values

    def __init__(self, channels: int, grid: tuple[int, int], options: SampledOptions):
        super().__init__()
        self.options, self.by_distance = options, options.posterior == "distance"
        self.num_codes, self.code_dim, self.grid = options.num_codes, options.code_dim, grid
        self.projection: nn.Module
        if self.by_distance:
            self.projection = nn.Identity() if channels == self.code_dim else Projection(channels, self.code_dim)
        else:
            self.projection = Projection(channels, self.num_codes)
            options = replace(options, init="normal", revive=0.0)
        standardized = self.by_distance and isinstance(self.projection, Projection)
        self.start_vectors = enough_vectors(options.num_codes) if standardized else options.start_vectors
        learns = "ema" if self.by_distance else "gradient"
        self.codebook = Codebook(options, self.code_dim, learns=learns, forgets_start=False)
        self.flows = nn.ModuleList(
            SimplexFlow(math.prod(grid), self.num_codes, parameters=options.iaf_parameters)
            for _ in range(options.iaf_flows)
        )

    def startup_flows(self) -> nn.ModuleList | None:
        return self.flows if len(self.flows) else None

    @torch.no_grad()
    def initialize(self, features: Tensor) -> None:
        if self.by_distance:
            if isinstance(self.projection, Projection):
                self.projection.standardize(features)
            self.codebook.initialize(vectors_of(self.projection(features)))

    def embed(self, codes: Tensor, levels: int | None = None) -> Tensor:
        return self.codebook.embed(codes)

    def code_vectors(self) -> Tensor:
        return self.codebook.table()

    def logits(self, features: Tensor, table: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits `[B, h, w, K]` of the posterior, and with distances the projected vectors `[B, h, w, D]`."""
        f = self.projection(features).movedim(1, -1)
        if not self.by_distance:
            return f, None
        center = table.detach().mean(dim=0)  # as in nearest_code: cdist too computes distances from products
        distances = torch.cdist((f - center).reshape(1, -1, self.code_dim), (table - center)[None])
        return -distances.view(*f.shape[:-1], self.num_codes), f

    def quantize(self, features: Tensor) -> Latent:
        f = self.projection(features)
        codes = self.codebook.nearest(vectors_of(f)).view(len(f), *f.shape[2:]) if self.by_distance else f.argmax(1)
        return Latent.of_codes(codes, self.embed(codes))

    def forward(self, features: Tensor, step: int) -> Latent:
        table = self.codebook.table()
        if self.training and self.by_distance:
            table = table.clone()  # snapshot: the EMA update below writes in place
        logits, f = self.logits(features, table)
        log_p = logits.log_softmax(-1)
        if not self.training:
            return self.hard_draw(log_p)
        w, log_q = self.assign(log_p, step)  # [S, B, h, w, K], [S, B]
        for flow in self.flows:
            w, log_det = flow(w.flatten(0, 1).flatten(1, 2))  # on [S*B, L, K]
            w = w.view(-1, *log_p.shape)
            log_q = log_q - self.volume_change * log_det.view(len(w), -1)
        z = w @ table  # [S, B, h, w, D]
        uncertainty = -log_q.detach() if self.exact else entropy_of(log_p.detach()).sum((1, 2))
        loss, stats = z.new_zeros(()), {"posterior_entropy": uncertainty.mean()}
        if f is not None:
            commitment = (f - z.detach()).square().mean()
            loss, stats = self.options.beta * commitment, stats | {"commitment": commitment.detach()}
            self.update(f.detach().flatten(0, 2), w.detach().mean(0).flatten(0, 2), step)
        w = w.flatten(0, 1)  # [S*B, h, w, K]
        return Latent(
            z.flatten(0, 1).movedim(-1, 1),
            w.detach().argmax(-1),
            log_q=log_q.flatten(),
            loss=loss,
            stats=stats,
            assignments=w.movedim(-1, 1),
            score=log_q if self.scored else None,
        )

    def assign(self, log_p: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Training's assignments `[S, B, h, w, K]` and their log q `[S, B]`, given log p `[B, h, w, K]`."""
        raise NotImplementedError

    def hard_draw(self, log_p: Tensor) -> Latent:
        """A latent of one code per position, drawn from log p `[B, h, w, K]`.

        Flows do not change it: they map the corners of the simplex to themselves.
        """
        return drawn_latent(log_p, self.embed)

    def update(self, f: Tensor, w: Tensor, step: int) -> None:
        """EMA update of the codebook, given vectors `[N, D]` and their soft assignments `[N, K]`."""
        self.codebook.ema_update(w.sum(0), w.T @ f, f, step)


class Deterministic(CategoricalPosterior):
    """The nearest code with the gradient of the softmax: w = one-hot(argmin d), straight through softmax(-d).

    Experiment 1 of the probabilistic VQ-VAEs. `vq` copies the gradient past the codes; here it reaches the encoder
    through the distances to all codes. The posterior is one code, so log q = 0.
    """

    stochastic = False

    def __init__(self, *, channels: int, grid: tuple[int, int], options: PosteriorOptions = PosteriorOptions()):
        super().__init__(channels, grid, SampledOptions(**asdict(options)))

    def assign(self, log_p: Tensor, step: int) -> tuple[Tensor, Tensor]:
        w = F.one_hot(log_p.argmax(-1), self.num_codes).to(log_p.dtype)
        return straight_through(log_p.exp(), w)[None], log_p.new_zeros(1, len(log_p))

    def hard_draw(self, log_p: Tensor) -> Latent:
        codes = log_p.argmax(-1)
        return Latent.of_codes(codes, self.embed(codes))


@dataclass(frozen=True, kw_only=True)
class CategoricalOptions(SampledOptions):
    average_samples: Annotated[
        bool, "decode the mean of the samples, not each sample; estimator=rloo always decodes each"
    ] = True
    estimator: Annotated[
        Literal["straight-through", "rloo"],
        "gradient of a draw: the softmax's, which is biased, or leave-one-out REINFORCE, which is not",
    ] = "straight-through"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.estimator == "rloo" and self.num_samples < 2:
            raise OptionError("num_samples", self.num_samples, "is too few for estimator=rloo; use 2 or more")
        if self.estimator == "rloo" and self.iaf_flows:
            raise OptionError("estimator", "rloo", "would not train iaf_flows, which keep one-hot draws; use 0")

    def idle(self) -> dict[str, str]:
        needs = super().idle()
        if self.estimator == "rloo":
            needs["average_samples"] = "estimator=straight-through"
        return needs


class Categorical(CategoricalPosterior):
    """Codes drawn from the posterior, straight through softmax(-d) (soft EM: 1805.11063, section 3).

    With average_samples, w is the mean of the samples' one-hots and log q the multinomial log probability of their
    counts; otherwise every sample is decoded. The gradient is the published one: sum p dL/dw, without a
    score-function term for the draw.

    With estimator=rloo every sample is decoded and the draw has no gradient of its own. The objective adds the
    score-function gradient, with the mean of the other samples as the baseline (Kool et al. 2019; the baseline of
    VIMCO, 1602.06725, for the bound itself). It is unbiased: its mean over draws is the bound's exact gradient. The
    commitment loss and the EMA of the codebook are not part of the bound.
    """

    options: CategoricalOptions

    def __init__(self, *, channels: int, grid: tuple[int, int], options: CategoricalOptions = CategoricalOptions()):
        super().__init__(channels, grid, options)
        self.scored = options.estimator == "rloo"
        self.relaxed = options.average_samples and not self.scored and options.num_samples > 1

    def assign(self, log_p: Tensor, step: int) -> tuple[Tensor, Tensor]:
        samples = self.options.num_samples
        codes = _draw(log_p, samples)  # [S, B, h, w]
        if self.options.average_samples and not self.scored:
            ones = torch.ones_like(codes, dtype=log_p.dtype).movedim(0, -1)
            counts = torch.zeros_like(log_p).scatter_add_(-1, codes.movedim(0, -1), ones)[None]
            w = counts / samples
            log_q = math.lgamma(samples + 1) - (counts + 1).lgamma().sum(-1) + (counts * log_p).sum(-1)
        else:
            w = F.one_hot(codes, self.num_codes).to(log_p.dtype)
            log_q = log_p.expand_as(w).gather(-1, codes.unsqueeze(-1)).squeeze(-1)
        w = w if self.scored else straight_through(log_p.exp().expand_as(w), w)
        return w, log_q.flatten(2).sum(2)


@dataclass(frozen=True, kw_only=True)
class GumbelOptions(SampledOptions):
    num_samples: Annotated[Count, "draws per position in training, each decoded; evaluation takes one, hard"] = 1
    temperature: Annotated[str, ScheduleText(above=0), "softmax temperature of a draw"] = "0.5"
    hard: Annotated[bool, "decode the one-hot of the largest w, straight through w"] = False
    entropy: Annotated[Literal["draw", "exact"], "log q in training: of the draw, or its mean over draws"] = "draw"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.entropy == "exact" and self.iaf_flows:
            raise OptionError("entropy", "exact", "ignores iaf_flows; use entropy=draw or iaf_flows=0")


class Gumbel(CategoricalPosterior):
    """Relaxed draws: w = softmax((log p + Gumbel noise) / temperature), 1611.01144 eq. 2 and 1611.00712.

    log q of a relaxed draw is approximated by sum_k w_k log p_k, which is exact at the corners of the simplex.
    entropy=exact replaces it by its mean over draws, sum_k p_k log p_k (DALL-E's KL to a uniform prior, 2102.12092,
    section 2.1). DALL-E and deep-vector-quantization have posterior=linear.
    """

    options: GumbelOptions
    volume_change = 1.0

    def __init__(
        self, *, channels: int, grid: tuple[int, int], total_steps: int, options: GumbelOptions = GumbelOptions()
    ):
        super().__init__(channels, grid, options)
        self.temperature = Schedule.parse(options.temperature, "temperature")
        self.total_steps, self.exact = total_steps, options.entropy == "exact"
        self.relaxed = not options.hard or options.iaf_flows > 0

    def assign(self, log_p: Tensor, step: int) -> tuple[Tensor, Tensor]:
        temperature = self.temperature(step, self.total_steps)
        relaxed = gumbel_softmax(log_p, self.options.num_samples, temperature)  # [S, B, h, w, K]
        relaxed = relaxed.to(log_p.dtype).clamp(1e-6, 1 - 1e-6)
        w = relaxed
        if self.options.hard:
            one_hot = F.one_hot(relaxed.argmax(-1), self.num_codes).to(log_p.dtype)
            w = straight_through(relaxed, one_hot)
        if self.exact:
            return w, -entropy_of(log_p).sum((1, 2)).expand(len(w), -1)
        return w, (w * log_p).flatten(2).sum(2)


def gumbel_softmax(log_p: Tensor, samples: int, temperature: float) -> Tensor:
    """Relaxed draws `[S, ..., K]` of log probabilities `[..., K]`."""
    # Gumbel noise is -log(-log u). torch's exponential draws, -log u, take four times as long on a CPU.
    uniform = shares.draw(torch.rand, (samples, *log_p.shape), dim=1, device=log_p.device)
    minus_noise = uniform.clamp_(min=torch.finfo(uniform.dtype).tiny).log_().neg_().log_()
    return ((log_p - minus_noise) / temperature).softmax(-1)


def drawn_latent(log_p: Tensor, embed: Callable[[Tensor], Tensor]) -> Latent:
    """A latent of one code per position, drawn from log p `[B, h, w, K]`; `embed` gives the vectors of codes."""
    codes = _draw(log_p, 1)[0]
    log_q = log_p.gather(-1, codes.unsqueeze(-1)).flatten(1).sum(1)
    stats = {"posterior_entropy": entropy_of(log_p).sum((1, 2)).mean()}
    return Latent(embed(codes), codes, log_q=log_q, loss=log_q.new_zeros(()), stats=stats)


@torch.no_grad()
def _draw(log_p: Tensor, samples: int) -> Tensor:
    """Draw codes `[S, ...]` from log probabilities `[..., K]`, by inverting the cumulative distribution.

    torch.multinomial validates its input, which synchronizes with the GPU.
    """
    cumulative = log_p.exp().cumsum(-1)
    reached = shares.draw(torch.rand, (*log_p.shape[:-1], samples), device=log_p.device) * cumulative[..., -1:]
    codes = torch.searchsorted(cumulative, reached, right=True)
    return codes.clamp(max=log_p.shape[-1] - 1).movedim(-1, 0)


def entropy_of(log_p: Tensor) -> Tensor:
    """Entropy in nats of log probabilities `[..., K]`."""
    return -(log_p.exp() * log_p).sum(-1)
