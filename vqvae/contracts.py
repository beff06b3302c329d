"""The contracts of the six slots: the methods that a member must or may have, and the values passed between slots.

Context names that a member's constructor may ask for (see registry.py):

    image_shape     (C, H, W) of an example; points of the plane are (2, 1, 1)
    data_variance   variance of the training data's pixels in [0, 1]
    channels, grid  feature channels and (h, w) of the nets' output; for priors, the grid of the codes
    total_steps     length of the run, where a schedule without steps ends
    num_codes       K, given to priors by bottlenecks with codes
    latent_dim      D, given to priors by continuous bottlenecks
    num_classes     number of labels that condition the prior, 0 for none
    scales          (h, w) of each scale of multi-scale codes, the coarsest first; () for other codes

B batch, S samples, C channels, H W pixels, D code dimension, K codes, h w code grid.
"""

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, TypedDict

import torch
from torch import Tensor, nn

from vqvae.errors import counted

if TYPE_CHECKING:
    from vqvae.autoencoder import Autoencoder, Elbo
    from vqvae.sampling import Sampling


OptimizerName = Literal["muon", "adamw"]  # a row of optimizer.OPTIMIZERS

MOST_COUNTED = 2**20  # codes of a level whose use is counted in training; a count takes 4 bytes


class Latent(NamedTuple):
    """A draw from the posterior q(z|x) of a batch. Some bottlenecks draw S samples in training: `[S*B, ...]`.

    Flat latents are 1x1 grids, so that all nets, priors and plots see one shape.
    """

    z: Tensor | None  # [S*B, D, h, w], the decoder's input; None in stage two, which has codes only
    codes: Tensor | None  # [S*B, h, w] int64, indices into the codebook; None for continuous latents
    log_q: Tensor  # [S*B] nats, log q(z|x) of this draw; 0 where the posterior is one code
    loss: Tensor  # scalar, for training: commitment, codebook, diversity ...
    stats: dict[str, Tensor]  # detached scalars to monitor, by name
    # [S*B, K, h, w] points of the simplex that replace the codes while a relaxed bottleneck trains
    assignments: Tensor | None = None
    # [S, B] log q of independent draws whose only gradient to the encoder is the score-function gradient
    score: Tensor | None = None

    @classmethod
    def of_codes(
        cls,
        codes: Tensor,
        z: Tensor | None = None,
        *,
        loss: Tensor | None = None,
        stats: dict[str, Tensor] | None = None,
    ) -> "Latent":
        """A latent whose posterior is one code per position, `[B, h, w]` (int64): log q = 0.

        Stage two trains on latents without z. The loss is 0 unless given.
        """
        log_q = torch.zeros(len(codes), device=codes.device)
        return cls(z, codes, log_q, log_q.new_zeros(()) if loss is None else loss, stats or {})

    def need_z(self) -> Tensor:
        """z; raises ValueError if the latent has codes only."""
        if self.z is None:
            raise ValueError("z is needed; this latent has codes only")
        return self.z

    def need_codes(self) -> Tensor:
        """The codes; raises ValueError if the latent is continuous."""
        if self.codes is None:
            raise ValueError("codes are needed; this latent is continuous")
        return self.codes

    def detached(self) -> "Latent":
        """The same latent, for a prior whose gradient must not reach the encoder."""
        return self if self.assignments is None else self._replace(assignments=self.assignments.detach())


class TrainOutput(NamedTuple):
    """The output of a module in the training loop."""

    loss: Tensor  # scalar, to minimize
    metrics: dict[str, Tensor]  # detached; scalars are means over the batch, others (code usage) sums over it


class Nets(Protocol):
    """Sizes of an encoder and a decoder, and the two modules themselves."""

    channels: int  # feature channels
    grid: tuple[int, int]  # (h, w) of the features
    spatial: bool = True  # whether a cell of the grid is a place in the image; False for a sequence, [L, 1]

    def encoder(self) -> nn.Module:
        """`[B, C, H, W]` to features `[B, channels, h, w]`."""

    def decoder(self, code_dim: int, out_channels: int) -> nn.Module:
        """`[B, code_dim, h, w]` to `[B, out_channels, H, W]`."""


class PriorContext(TypedDict, total=False):
    """The facts about a bottleneck's latent that priors get."""

    num_codes: int
    latent_dim: int
    grid: tuple[int, int]


class Bottleneck(nn.Module):
    """Features `[B, channels, h, w]` to a latent.

    `forward(features, step)` draws one. In training it may update the bottleneck's state (EMA codebooks do).
    `quantize(features)` returns the most likely latent, in training and evaluation alike: it draws nothing and
    changes nothing.
    """

    code_dim: int  # D, channels of the decoder's input
    grid: tuple[int, int]  # (h, w) of the latent
    stochastic = False  # whether a draw may differ from the most likely latent
    relaxed = False  # whether z lies between codes in training, so that log p + log p(z) - log q is no bound
    start_vectors = 0  # feature vectors that `initialize` wants; 0 for none
    scales: tuple[tuple[int, int], ...] = ()  # (h, w) of each scale, if the codes are those of several grids

    def forward(self, features: Tensor, step: int) -> Latent:
        raise NotImplementedError

    def quantize(self, features: Tensor) -> Latent:
        raise NotImplementedError

    def initialize(self, features: Tensor) -> None:
        """Fit the start to features `[B, channels, h, w]`, before the first step. Optional."""

    def startup_flows(self) -> nn.ModuleList | None:
        """Flows on the latent that may start to train later than the rest. Optional."""
        return None

    def prior_context(self) -> PriorContext:
        raise NotImplementedError

    def describe(self) -> str:
        """The size of an image's latent in words."""
        raise NotImplementedError


class Discrete(Bottleneck):
    """A bottleneck whose latent is a grid of codes.

    A bottleneck with several codes per position, or several levels, lays them out as one grid, in the order in which
    a prior predicts them best; `maps` takes that grid apart.
    """

    num_codes: int  # K
    level_names: tuple[str, ...] = ("codes",)  # the keys of `maps`
    start_vectors = 20_000

    @property
    def tokens(self) -> int:
        """The number of codes of an image."""
        return math.prod(self.grid)

    @property
    def bits(self) -> float:
        """The bits of an image's codes, tokens x log2 K."""
        return self.tokens * math.log2(self.num_codes)

    @property
    def counted(self) -> bool:
        """Whether every code is counted. In larger codebooks, evaluation counts the codes that occur, training none."""
        return self.num_codes <= MOST_COUNTED

    def embed(self, codes: Tensor, levels: int | None = None) -> Tensor:
        """The decoder's input `[B, D, ...]` for codes `[B, h, w]`; with `levels`, from the first levels only."""
        raise NotImplementedError

    def code_vectors(self) -> Tensor:
        """The codebook as a table `[K, D]`, for plots."""
        raise NotImplementedError

    def maps(self, codes: Tensor) -> dict[str, Tensor]:
        """The codes `[B, h, w]` as one named map per level, for plots and counts."""
        return {self.level_names[0]: codes}

    def usage(self, codes: Tensor) -> Tensor:
        """How often each code of each level occurs, `[levels, K]`."""
        return torch.stack([count_codes(level, self.num_codes) for level in self.maps(codes).values()])

    def prior_context(self) -> PriorContext:
        return {"num_codes": self.num_codes, "grid": self.grid}

    def describe(self) -> str:
        h, w = self.grid
        return f"{h}x{w} codes of {self.num_codes:,}: {counted(self.tokens, 'token')}, {counted(self.bits, 'bit')}"


class Continuous(Bottleneck):
    """A bottleneck whose latent is a vector `[B, D, 1, 1]`."""

    def prior_context(self) -> PriorContext:
        return {"latent_dim": self.code_dim, "grid": self.grid}

    def describe(self) -> str:
        return counted(self.code_dim, "dimension")


def count_codes(codes: Tensor, num_codes: int) -> Tensor:
    """How often each code occurs among codes of any shape, `[K]` float32."""
    codes = codes.flatten()  # torch.bincount synchronizes with the GPU
    ones = torch.ones(len(codes), device=codes.device)
    return torch.zeros(num_codes, device=codes.device).index_add_(0, codes, ones)


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while; every submodule gets its own mode back."""
    modes = [(m, m.training) for m in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for m, training in modes:
            m.training = training


def dtype_of(module: nn.Module) -> torch.dtype:
    """The type of a module's weights; float32 where it has none."""
    tensors = itertools.chain(module.parameters(), module.buffers())
    return next((t.dtype for t in tensors if t.is_floating_point()), torch.float32)


def check_codes(codes: object, num_codes: int, grid: tuple[int, ...]) -> Tensor:
    """The codes as int64. Raises ValueError unless they are integers `[B, *grid]` from 0 to num_codes - 1.

    In a program that torch.export makes, codes out of range raise RuntimeError when the program runs.
    """
    if not isinstance(codes, Tensor) or codes.is_floating_point() or codes.is_complex() or codes.dtype == torch.bool:
        raise ValueError(f"codes must be a tensor of integers, not {kind_of(codes)}")
    if codes.ndim != 1 + len(grid) or tuple(codes.shape[1:]) != tuple(grid):
        raise ValueError(f"codes must have shape [B, {', '.join(map(str, grid))}], not {list(codes.shape)}")
    codes = codes.long()  # torch compares no uint16
    expected = f"codes must be from 0 to {num_codes - 1}"
    if torch.compiler.is_exporting():  # codes have no values yet
        torch._assert_async(((codes >= 0) & (codes < num_codes)).all(), expected)
    elif codes.numel() and not (int(codes.min()) >= 0 and int(codes.max()) < num_codes):
        raise ValueError(f"{expected}, not {int(codes.min())} to {int(codes.max())}")
    return codes


def kind_of(value: object) -> str:
    """The kind of a value, for messages: the dtype of a tensor, the type of anything else."""
    if isinstance(value, Tensor):
        return str(value.dtype)
    if type(value).__module__ == "numpy":
        return "a numpy array; torch.from_numpy makes one a tensor"
    return type(value).__name__


class Prior(nn.Module):
    """A distribution over latents on a grid (h, w)."""

    sampling_options: tuple[str, ...]  # the fields of `sampling.Sampling` that `sample` takes
    exact = True  # whether `log_prob` is log p(z) itself; otherwise its mean over the noise is at most log p(z)
    optimizer: OptimizerName = "adamw"  # the default for training on stored codes
    anchor: Tensor  # scalar; samples have its device and dtype

    def __init__(self, grid: tuple[int, int]):
        super().__init__()
        self.grid = (grid[0], grid[1])
        self.register_buffer("anchor", torch.zeros(()), persistent=False)

    @property
    def has_parameters(self) -> bool:
        """Whether there is anything to train; `uniform` and `normal` have no parameters."""
        return any(True for _ in self.parameters())

    def log_prob(self, latent: Latent, labels: Tensor | None = None) -> Tensor:
        """log p(z) in nats, `[B]`."""
        raise NotImplementedError

    def check_sampling(self, **options: Any) -> "Sampling":
        """Options of `sample`, in their types. Raises `OptionError`, a ValueError, for values out of range."""
        raise NotImplementedError

    def sample(self, n: int, *, generator: torch.Generator | None = None, **options: Any) -> Tensor:
        """n draws: codes `[n, h, w]`, or vectors `[n, D, h, w]`; at temperature 0, the likeliest of each position."""
        raise NotImplementedError


class Likelihood(nn.Module):
    """The distribution that the decoder's output gives to pixels x in [0, 1], `[B, C, H, W]`.

    Parameters come as `[B, P*C, H, W]`, parameter-major: all channels of the first parameter, then of the second.
    """

    discrete = False  # whether it gives probabilities of 8-bit pixels, and so bits per dimension
    stochastic = False  # whether `log_prob` is random; the mean of its exponential is p(x|z)
    takes_points = False  # whether x may also be points of the plane, which are not in [0, 1]
    params_per_channel: int  # P
    log_normalizer = 0.0  # nats that -log p contains whatever the parameters are; `reconstruction` leaves them out

    def network_input(self, x: Tensor) -> Tensor:
        """The encoder's input for x."""
        raise NotImplementedError

    def log_prob(self, params: Tensor, x: Tensor) -> Tensor:
        """log p(x|z) in nats, `[B]`."""
        raise NotImplementedError

    def center(self, params: Tensor) -> Tensor:
        """The image shown, `[B, C, H, W]`: the mean of the pixels or their median; MSE and PSNR are of it."""
        raise NotImplementedError

    def sample(self, params: Tensor) -> Tensor:
        """A draw, `[B, C, H, W]`."""
        raise NotImplementedError

    def check(self, images: Tensor) -> None:
        """Raise `OptionError` for images `[N, C, H, W]` that the likelihood does not fit. Optional."""


class Objective(nn.Module):
    """The loss of training. Evaluation never sees it.

    It owns freezing, stop-gradients and the groups of parameters that the optimizer gets. An objective with a net of
    its own (a perceptual loss, a discriminator) registers it as a submodule and returns its parameters as a group.
    """

    def forward(self, elbo: "Elbo", model: "Autoencoder", step: int) -> Tensor:
        """The scalar loss of a batch, given the terms of its bound. `elbo.x` are the images."""
        raise NotImplementedError

    def check(self, model: "Autoencoder") -> None:
        """Raise `OptionError` for a model that lacks what the objective trains. Optional."""

    def freeze(self, model: "Autoencoder", step: int) -> None:
        """Set `requires_grad` for this step, as a function of the step only. Optional."""

    def for_prior(self, latent: Latent) -> Latent:
        """The latent as the prior sees it in training; detach it here to keep the prior from pulling the encoder."""
        return latent

    def parameter_groups(self, model: "Autoencoder", weight_decay: float) -> list[dict[str, Any]]:
        """Groups for optimizer.py: `params`, settings of AdamW, and `lr_scale`, which multiplies the scheduled rate.

        Muon may train the parameters of a group with `kernels`.
        """
        raise NotImplementedError


class Trainable(nn.Module):
    """A module that the training loop can train."""

    monitor: str  # the held-out metric whose lowest value makes best.pt
    headline: tuple[str, ...]  # metrics for the terminal, the most important first

    def forward(self, batch: Tensor, labels: Tensor, step: int) -> TrainOutput:
        raise NotImplementedError

    def of_batch(self, metrics: dict[str, Tensor]) -> dict[str, Tensor]:
        """Add the metrics that are functions of a batch's sums, after the batch's shares were added up."""
        return metrics

    def summary(self, means: dict[str, Tensor]) -> dict[str, float]:
        """Metrics averaged over steps, as plain numbers."""
        raise NotImplementedError

    def initialize(self, batches: Callable[[int], Tensor]) -> None:
        """Called before the first step; `batches(n)` gives n training examples, the same in every process. Optional."""

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """Groups for optimizer.py, as of `Objective.parameter_groups`."""
        raise NotImplementedError

    def saved_state(self) -> dict[str, Any]:
        """The state of the module in a checkpoint: the autoencoder as `model`, and more."""
        raise NotImplementedError
