"""Base classes of all priors, and the checks of what their samplers take.

B batch, h w code grid, K codes.
"""

from typing import Any

import torch
from torch import Tensor, nn

from vqvae.contracts import check_codes, kind_of
from vqvae.registry import Option, Range


class BasePrior(nn.Module):
    """A distribution over latents on a grid (h, w). Members implement `log_prob` and `sample` of `contracts.Prior`."""

    anchor: Tensor  # scalar; samples have its device and dtype

    def __init__(self, grid: tuple[int, int]):
        super().__init__()
        self.grid = (grid[0], grid[1])
        self.register_buffer("anchor", torch.zeros(()), persistent=False)


class CodePrior(BasePrior):
    """A distribution over codes `[B, h, w]`, conditional on labels if `num_classes` > 0."""

    def __init__(self, num_codes: int, grid: tuple[int, int], num_classes: int = 0):
        super().__init__(grid)
        self.num_codes, self.num_classes = num_codes, num_classes

    def check_top_k(self, top_k: Any) -> int:
        """The number of most likely codes to draw from; 0 for all. Raises ValueError unless it is from 0 to K."""
        return number("top_k", int, top_k, Range(0, self.num_codes))

    def check_given(self, n: int, given: tuple[Tensor, int] | None) -> tuple[Tensor, int]:
        """Codes `[n, h, w]` (int64) and how many of their rows a sample keeps. Raises ValueError if out of range."""
        device = self.anchor.device
        if given is None:
            return torch.zeros(n, *self.grid, dtype=torch.int64, device=device), 0
        codes = check_codes(given[0], self.num_codes, self.grid).to(device)
        if len(codes) != n:
            raise ValueError(f"given codes must be those of {n} images, not of {len(codes)}")
        return codes, number("rows", int, given[1], Range(0, self.grid[0]))

    def check_labels(self, n: int, labels: Tensor | None) -> Tensor | None:
        """The labels `[n]` of n images as int64, or None if the prior has no classes.

        Raises ValueError if labels are missing or out of range. Labels on a GPU are not read, which would synchronize
        with it.
        """
        if not self.num_classes:
            return None
        known = f"from 0 to {self.num_classes - 1}"
        if labels is None:
            raise ValueError(f"this prior is conditional and needs labels {known}")
        if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.dtype == torch.bool:
            raise ValueError(f"labels must be a tensor of integers, not {kind_of(labels)}")
        if labels.shape != (n,):
            raise ValueError(f"labels must have shape [{n}], not {list(labels.shape)}")
        readable = labels.device.type == "cpu" and not torch.compiler.is_compiling()
        labels = labels.long()
        if readable and n and not (int(labels.min()) >= 0 and int(labels.max()) < self.num_classes):
            raise ValueError(f"labels must be {known}, not {int(labels.min())} to {int(labels.max())}")
        return labels.to(self.anchor.device)

    def sample_labels(self, n: int, labels: Tensor | None) -> Tensor | None:
        """The same for sampling. Raises ValueError for labels that the prior would ignore."""
        if labels is not None and not self.num_classes:
            raise ValueError("this prior is not conditional and takes no labels")
        return self.check_labels(n, labels.cpu() if isinstance(labels, Tensor) else labels)


def number(name: str, kind: type, value: Any, rule: Range) -> Any:
    """The value of a sampler's option. Raises `OptionError`, a ValueError, that names it and its range."""
    return Option(name, kind, None, (rule,), "").convert(value)


def check_temperature(temperature: Any) -> float:
    """A temperature: a finite number, at least 0."""
    return number("temperature", float, temperature, Range(0))


def check_count(n: Any) -> int:
    """A number of samples."""
    return number("n", int, n, Range(0))
