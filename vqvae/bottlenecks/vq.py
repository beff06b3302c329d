"""Vector quantization: every feature vector becomes the nearest entry of a codebook.

B batch, h w code grid, N = B h w vectors, D code dimension, K codes, sg stop-gradient.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqvae import distributed, shares
from vqvae.bottlenecks.base import CodeOptions, Projection, entropy, vectors_of
from vqvae.bottlenecks.codebook import Codebook, CodebookOptions, enough_vectors, kmeans_codebook
from vqvae.bottlenecks.gradients import GRADIENTS, Gradient
from vqvae.bottlenecks.nearest import nearest_code
from vqvae.contracts import Discrete, Latent
from vqvae.errors import OptionError
from vqvae.registry import Count, Range, checked


@dataclass(frozen=True, kw_only=True)
class NearestOptions(CodeOptions):
    gradient: Gradient = "straight-through"


class NearestCode(Discrete):
    """z = e_k with k = argmin_j ||f - e_j||, and the losses of vq; subclasses give the table e as `code_vectors`."""

    learns_by_gradient = True
    weight, diversity, temperature = 1.0, 0.0, 1.0

    def __init__(self, channels: int, grid: tuple[int, int], options: NearestOptions, projection: bool = True):
        super().__init__()
        self.options, self.gradient_estimator = options, GRADIENTS[options.gradient]
        self.num_codes, self.code_dim, self.grid = options.num_codes, options.code_dim, grid
        self.projection: nn.Module = Projection(channels, self.code_dim) if projection else nn.Identity()

    def project(self, features: Tensor) -> Tensor:
        """The vectors `[B, D, h, w]` that are compared with the codes, for features `[B, channels, h, w]`."""
        return self.projection(features)

    def update(self, f: Tensor, codes: Tensor, step: int) -> None:
        """Update the codebook outside the optimizer (EMA, revival), given vectors `[N, D]` and their codes `[N]`."""

    def embed(self, codes: Tensor, levels: int | None = None) -> Tensor:
        return F.embedding(codes, self.code_vectors()).movedim(-1, 1)

    def quantize(self, features: Tensor) -> Latent:
        return self._nearest(features, diversity=0.0)[0]

    def forward(self, features: Tensor, step: int) -> Latent:
        latent, f, codes = self._nearest(features, self.diversity if self.training else 0.0)
        if self.training:
            self.update(f.detach(), codes, step)
        return latent

    def _nearest(self, features: Tensor, diversity: float) -> tuple[Latent, Tensor, Tensor]:
        """The latent, the vectors `[N, D]` and their codes `[N]`."""
        f, table = self.project(features), self.code_vectors()  # [B, D, h, w], [K, D]
        rows = vectors_of(f)
        nearest = nearest_code(rows, table)
        codes = nearest.view(len(f), *f.shape[2:])
        e = F.embedding(codes, table).movedim(-1, 1)
        commitment = F.mse_loss(f, e.detach())
        loss, stats = self.options.beta * commitment, {"commitment": commitment.detach()}
        if self.learns_by_gradient:
            loss = loss + F.mse_loss(e, f.detach())
        if diversity:
            # cloned, because `update` may change the table before the gradient is computed
            varied = entropy(soft_usage(rows, table.clone(), self.temperature))
            loss, stats = loss - diversity * varied, stats | {"usage_entropy": varied.detach()}
        z = self.gradient_estimator(f, e)
        return Latent.of_codes(codes, z, loss=self.weight * loss, stats=stats), rows, nearest


def soft_usage(f: Tensor, codebook: Tensor, temperature: float) -> Tensor:
    """Mean over the whole batch's vectors f `[N, D]` of softmax_k(-||f_n - e_k||^2 / temperature), `[K]`."""
    center = codebook.detach().mean(dim=0)  # as in nearest_code
    f, codebook = f - center, codebook - center
    # without ||f_n||^2, which is the same for every k
    usage = ((2 * f @ codebook.T - codebook.square().sum(dim=1)) / temperature).softmax(dim=1).mean(dim=0)
    return shares.mean_over(usage, len(f))


@dataclass(frozen=True, kw_only=True)
class VQOptions(CodebookOptions, NearestOptions):
    weight: Annotated[float, Range(0), "factor on the whole loss (10 in deep-vector-quantization)"] = 1.0
    diversity: Annotated[float, Range(0), "weight of the entropy of soft usage, which spreads usage over codes"] = 0.0
    temperature: Annotated[float, Range(1e-6), "softmax temperature of soft usage"] = 1.0

    def idle(self) -> dict[str, str]:
        return super().idle() | ({} if self.diversity else {"temperature": "diversity above 0"})


class VQ(NearestCode):
    """Vector quantization with a codebook updated by EMA or by gradient (1711.00937, eq. 1-3 and appendix A.1).

    z = e_k with k = argmin_j ||f - e_j||, where f is the projected feature vector.
    Loss: weight * (beta * mean (f - sg e)^2 [+ mean (sg f - e)^2 with codebook=gradient] - diversity * H), where H is
    the entropy of soft usage, mean_n softmax_k(-||f_n - e_k||^2 / temperature) (2310.05737, second term of eq. 5).
    """

    options: VQOptions
    unit_norm = False

    @checked
    def __init__(
        self,
        *,
        channels: int,
        grid: tuple[int, int],
        options: VQOptions = VQOptions(),
        projection: Annotated[bool, "1x1 convolution from the features to code_dim; without it both must agree"] = True,
    ):
        if not projection and channels != options.code_dim:
            problem = f"must equal the nets' {channels} feature channels with projection=no"
            raise OptionError("code_dim", options.code_dim, problem)
        super().__init__(channels, grid, options, projection)
        self.weight, self.diversity, self.temperature = options.weight, options.diversity, options.temperature
        self.learns_by_gradient = options.codebook == "gradient"
        self.start_vectors = options.start_vectors
        options.start(self.projection)
        self.codebook = Codebook(options, self.code_dim, learns=options.codebook, unit_norm=self.unit_norm)

    @torch.no_grad()
    def initialize(self, features: Tensor) -> None:
        self.options.prepare(self.projection, features)
        self.codebook.initialize(vectors_of(self.project(features)))

    def code_vectors(self) -> Tensor:
        return self.codebook.table()

    def update(self, f: Tensor, codes: Tensor, step: int) -> None:
        self.codebook.update(f, codes, step)


@dataclass(frozen=True, kw_only=True)
class CosineOptions(VQOptions):
    code_dim: Annotated[Count, "code dimension D; a small one keeps many codes in use"] = 8
    init: Annotated[
        Literal["kmeans", "normal"], "first codebook: k-means++ of the first features, or uniform on the sphere"
    ] = "kmeans"
    temperature: Annotated[float, Range(1e-6), "softmax temperature of soft usage; distances^2 are at most 4"] = 0.1


class CosineVQ(VQ):
    """Vector quantization on the unit sphere: the code of largest cosine similarity (2110.04627, section 3.2).

    Features and codes have length 1, so that ||f - e||^2 = 2 - 2 cos(f, e). Losses and updates are those of vq for
    unit vectors; an EMA codebook stores the directions of its running means.
    """

    unit_norm = True

    def __init__(self, *, channels: int, grid: tuple[int, int], options: CosineOptions = CosineOptions()):
        super().__init__(channels=channels, grid=grid, options=options)

    def project(self, features: Tensor) -> Tensor:
        return F.normalize(super().project(features), dim=1)


@dataclass(frozen=True, kw_only=True)
class SimVQOptions(NearestOptions):
    init: Annotated[
        Literal["kmeans", "normal"],
        "first table C W: k-means++ of the first features, or C from N(0, 1/D) and W from their covariance",
    ] = "kmeans"


class SimVQ(NearestCode):
    """Nearest code in a table C W of frozen vectors C and a learned matrix W (2411.02038, section 4).

    The gradient of any code changes W and so moves all codes: unused codes do not stay behind.
    Loss: beta * mean (f - sg e)^2 + mean (sg f - e)^2. Features are standardized before the first step.

    init=normal is the published start. With many dimensions, the few random vectors nearest to the origin are then
    the nearest to most features: with code_dim=64, usage starts at a perplexity of 8 of 512 and recovers slowly.
    """

    options: SimVQOptions
    projection: Projection
    frozen: Tensor  # C, [K, D]

    def __init__(self, *, channels: int, grid: tuple[int, int], options: SimVQOptions = SimVQOptions()):
        super().__init__(channels, grid, options)
        self.start_vectors = enough_vectors(options.num_codes)
        self.register_buffer("frozen", torch.randn(self.num_codes, self.code_dim) / self.code_dim**0.5)
        self.mapping = nn.Linear(self.code_dim, self.code_dim, bias=False)

    @torch.no_grad()
    def initialize(self, features: Tensor) -> None:
        self.projection.standardize(features)
        vectors, scale = vectors_of(self.projection(features)), self.code_dim**0.5
        if self.options.init == "kmeans":
            self.frozen.copy_(kmeans_codebook(vectors, self.num_codes) / scale)
            self.mapping.weight.copy_(scale * torch.eye(self.code_dim))
            return
        vectors = distributed.gather_rows(vectors)
        covariance = torch.cov(vectors.T, correction=min(1, len(vectors) - 1)).cpu().double()  # MPS has no float64
        variances, axes = torch.linalg.eigh(covariance.view(self.code_dim, self.code_dim))
        self.mapping.weight.copy_((scale * axes * variances.clamp(min=0).sqrt() @ axes.T).float())

    def code_vectors(self) -> Tensor:
        return self.mapping(self.frozen)
