"""Bottlenecks as layers of one's own model: `quantize = VQ(64, 512); out = quantize(z)`.

B batch, N vectors, D channels, h w grid, K codes, Q levels.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqvae.bottlenecks import BOTTLENECKS
from vqvae.bottlenecks.codebook import Codebook
from vqvae.contracts import Discrete, Latent, check_codes, dtype_of, kind_of
from vqvae.devices import computes_again, full_precision
from vqvae.errors import OptionError
from vqvae.registry import Choice, Member, Slot, build, signature

SLOT = Slot("bottleneck", BOTTLENECKS)
SIZED = ("hierarchy", "multiscale")  # have to know the size of the grid when they are made
OF_THE_BOUND = ("stochastic",)  # learn by log q, which a layer does not return
LAYERS = [
    name for name, member in BOTTLENECKS.items() if issubclass(member, Discrete) and name not in (*SIZED, *OF_THE_BOUND)
]


class Quantized(NamedTuple):
    """The output of a layer; `z, codes, loss, stats = quantize(x)` works too."""

    z: Tensor  # like the input; gradients pass to the input by the bottleneck's estimator
    codes: Tensor  # int64, [B, h, w] or [B, N]; with Q > 1 levels [..., Q]
    loss: Tensor  # scalar, to add to the loss of the model
    stats: dict[str, Tensor]  # detached scalars to monitor


def _count_again(layer: Any, _: Any) -> None:
    layer._step = None


class Quantizer(nn.Module):
    """Any bottleneck with codes as a layer, for features `[B, D, h, w]` or sequences `[B, N, D]`.

    In training, the first batch initializes the codebook (k-means, or the bottleneck's own method) and every batch
    updates it. In evaluation nothing changes, and each vector gets its most likely code. `state_dict()` has the whole
    state. A loaded layer continues its training: only a layer that was never trained initializes its codebook.

    A 1x1 convolution projects the vectors to `code_dim` (default: D) dimensions; some bottlenecks, such as `vq`, have
    none if that is D. Another one brings z back to D channels, if the dimensions differ. The layer takes floats of any
    type and computes in the type of its weights, within autocast too; z has the type of the input. So keep it in
    float32 within a model in half precision (`layer.float()`): a codebook in half precision cannot be trained, and
    raises ValueError. So does a codebook within a gradient checkpoint, which would update it twice in a step: end the
    checkpoint before the layer. In a process group, such as DDP's, the codebook is updated from the vectors of all
    processes, and all must call the layer in training.

        quantize = Quantizer("residual", 64, num_codes=256, quantizers=4)
        out = quantize(features)
        loss = model_loss + out.loss

    name         a row of `python train.py --list bottlenecks`, except gaussian, hierarchy, multiscale, stochastic
    dim          D, channels of the input
    total_steps  training steps after which schedules without a length of their own end
    options      those of the bottleneck; `num_samples` is 1 unless given

    Raises `OptionError`, a ValueError, for options out of range.
    """

    steps: Tensor  # scalar int64, training batches so far

    def __init__(self, name: str, dim: int, *, total_steps: int = 100_000, **options: Any):
        super().__init__()
        if name not in LAYERS:
            raise OptionError("name", name, f"is no layer; known: {', '.join(LAYERS)}")
        if options.get("estimator") == "rloo":
            problem = "needs the bound, which a layer does not know; use straight-through"
            raise OptionError("estimator", "rloo", problem, owner=name)
        member: Member = BOTTLENECKS[name]
        known_options = signature(member).options
        if "code_dim" in known_options:
            options.setdefault("code_dim", dim)
            if "projection" in known_options and options["code_dim"] == dim:
                options.setdefault("projection", False)
        if "num_samples" in known_options:
            options.setdefault("num_samples", 1)
        context = {"channels": dim, "grid": (1, 1), "total_steps": total_steps}
        self.dim = dim
        self.bottleneck: Discrete = build(SLOT, Choice(name, options), context)
        if self.bottleneck.startup_flows() is not None:
            problem = "flows need the size of the grid; leave them out"
            raise OptionError("iaf_flows", options["iaf_flows"], problem, owner=name)
        code_dim = self.bottleneck.code_dim
        self.output: nn.Module = nn.Identity() if code_dim == dim else nn.Conv2d(code_dim, dim, 1)
        self.levels = len(self.bottleneck.level_names)  # Q
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self._step: int | None = None  # steps as a plain number, which no GPU has to be waited for
        self.register_load_state_dict_post_hook(_count_again)

    @property
    def num_codes(self) -> int:
        """K."""
        return self.bottleneck.num_codes

    @property
    def codebook(self) -> Tensor:
        """The code vectors `[K, code_dim]`, of the first level if there are several."""
        return self.bottleneck.code_vectors()

    def forward(self, x: Tensor) -> Quantized:
        """Quantize features `[B, D, h, w]` or a sequence `[B, N, D]`.

        Raises ValueError for other shapes and types, for a grid or a sequence without positions, for a training batch
        without examples, and for a first one that is not finite. Later ones that are not finite update no codebook.
        """
        if not isinstance(x, Tensor) or not x.is_floating_point():
            raise ValueError(f"the input must be a tensor of floats, not {kind_of(x)}")
        channel = {3: 2, 4: 1}.get(x.dim())
        if channel is None or x.shape[channel] != self.dim:
            raise ValueError(f"the input is {list(x.shape)}; it must be [B, {self.dim}, h, w] or [B, N, {self.dim}]")
        features = x.mT.unsqueeze(3) if x.dim() == 3 else x
        if not x[:1].numel() and (self.training or len(x)):
            raise ValueError(f"the input is {list(x.shape)}; it must have at least one vector")
        with full_precision(x):
            features = features.to(dtype_of(self))
            latent = self._train(features) if self.training else self.bottleneck.quantize(features)
            z = self._output(latent.need_z().to(features.dtype), sequence=x.dim() == 3)
        codes = latent.need_codes().unflatten(2, (-1, self.levels))  # [B, h, w, Q]
        codes = codes.squeeze(2) if x.dim() == 3 else codes
        codes = codes.squeeze(-1) if self.levels == 1 else codes
        return Quantized(z.to(x.dtype), codes, latent.loss, latent.stats)

    def _train(self, features: Tensor) -> Latent:
        """The latent of features `[B, D, h, w]`, with which the bottleneck is updated."""
        if torch.compiler.is_compiling():  # k-means cannot be compiled, and every step would be compiled again
            return torch.compiler.disable(self._train)(features)
        step = int(self.steps) if self._step is None else self._step
        if computes_again():
            if any(isinstance(part, Codebook) for part in self.bottleneck.modules()):
                problem = "a codebook cannot be updated twice in a step; end the gradient checkpoint before the layer"
                raise ValueError(problem)
            return self.bottleneck(features, step - 1)
        if step == 0:
            first = features.detach()
            if not first.isfinite().all():
                raise ValueError("the first training batch, to which the codes are fitted, is not finite")
            self.bottleneck.initialize(first)
        latent = self.bottleneck(features, step)
        self._step = step + 1
        self.steps.add_(1)
        return latent

    def decode(self, codes: Tensor) -> Tensor:
        """Decode codes in the form that `forward` returns to z, `[B, D, h, w]` or `[B, N, D]`.

        With Q levels, `codes` may have only the first ones. Raises ValueError for codes that are not integers or out of
        range, and for other shapes.
        """
        codes = check_codes(codes, self.num_codes, tuple(getattr(codes, "shape", ())[1:]))
        levels = f", {self.levels}" if self.levels > 1 else ""
        axes = codes.dim() - bool(levels)
        if axes not in (2, 3) or (levels and not 1 <= codes.shape[-1] <= self.levels):
            raise ValueError(f"the codes are {list(codes.shape)}; they must be [B, h, w{levels}] or [B, N{levels}]")
        codes = codes if levels else codes.unsqueeze(-1)
        given = codes.shape[-1]
        codes = F.pad(codes, (0, self.levels - given))
        grid = codes.unsqueeze(2) if axes == 2 else codes  # [B, h, w, Q]
        return self._output(self.bottleneck.embed(grid.flatten(2), given).to(dtype_of(self)), sequence=axes == 2)

    def _output(self, z: Tensor, *, sequence: bool) -> Tensor:
        """z `[B, code_dim, h, w]` in the shape of the input."""
        z = self.output(z)
        return z.squeeze(3).mT if sequence else z


class VQ(Quantizer):
    """Vector quantization with an EMA codebook (1711.00937): `VQ(dim, num_codes)`."""

    def __init__(self, dim: int, num_codes: int = 512, **options: Any):
        super().__init__("vq", dim, num_codes=num_codes, **options)


class ResidualVQ(Quantizer):
    """Residual quantization (2107.03312): `ResidualVQ(dim, num_codes, quantizers=4)`; codes are `[..., Q]`."""

    def __init__(self, dim: int, num_codes: int = 512, **options: Any):
        super().__init__("residual", dim, num_codes=num_codes, **options)


class SimVQ(Quantizer):
    """A learned linear map of a fixed codebook (2411.02038): `SimVQ(dim, num_codes)`."""

    def __init__(self, dim: int, num_codes: int = 512, **options: Any):
        super().__init__("simvq", dim, num_codes=num_codes, **options)


class FSQ(Quantizer):
    """Finite scalar quantization (2309.15505): `FSQ(dim, levels=(8, 5, 5, 5))`."""

    def __init__(self, dim: int, levels: Sequence[int] = (8, 8, 8), **options: Any):
        super().__init__("fsq", dim, levels=",".join(map(str, levels)), **options)


class LFQ(Quantizer):
    """Lookup-free quantization (2310.05737): `LFQ(dim, bits=9)`, with 2^bits codes."""

    def __init__(self, dim: int, bits: int = 9, **options: Any):
        super().__init__("lfq", dim, bits=bits, **options)
