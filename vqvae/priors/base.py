"""The base class of priors over codes, and the checks of what samplers take.

B batch, h w code grid, K codes.
"""

from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

import torch
from torch import Tensor

from vqvae import shares
from vqvae.contracts import Prior, check_codes, evaluating, kind_of
from vqvae.errors import OptionError
from vqvae.registry import Range, whole_number_in
from vqvae.sampling import Sampling

LabelDrop = Annotated[
    float, Range(0, below=1), "share of training examples without their label, which sampling with guidance needs"
]


Progress = Callable[[int, int], None]  # gets (positions done, positions)


class Request(NamedTuple):
    """The arguments of `CodePrior.sample`, checked."""

    n: int
    how: Sampling
    labels: Tensor | None  # [n], if the prior has classes
    given: Tensor  # codes [n, h, w], of which `rows` are kept
    rows: int
    generator: torch.Generator | None
    progress: Progress


class CodePrior(Prior):
    """A distribution over codes `[B, h, w]`, conditional on labels if `num_classes` > 0.

    With `label_drop` > 0, training replaces that share of labels by an additional class, `num_classes`, which means "no
    label". Classifier-free guidance (2207.12598) compares the logits with and without labels. Members have `label_rows`
    embeddings of classes. They implement `log_prob` and `draw_codes`.
    """

    sampling_options: tuple[str, ...] = ("temperature", "top_k", "top_p", "guidance")

    def __init__(self, num_codes: int, grid: tuple[int, int], num_classes: int = 0, label_drop: float = 0.0):
        super().__init__(grid)
        self.num_codes, self.num_classes = num_codes, num_classes
        self.label_drop = label_drop if num_classes else 0.0
        self.label_rows = num_classes + (self.label_drop > 0)

    @torch.no_grad()
    def sample(
        self,
        n: int,
        *,
        labels: Tensor | None = None,
        given: tuple[Tensor, int] | None = None,
        generator: torch.Generator | None = None,
        progress: Progress | None = None,
        **options: Any,
    ) -> Tensor:
        """Draw codes `[n, h, w]` (int64).

        labels     classes `[n]`, needed if the prior has classes, and refused if it has none.
        given      codes `[n, h, w]` and how many of their rows to keep; the rest is drawn.
        progress   called with (positions done, positions) as the sample grows.
        options    those in `sampling_options`; `sampling.Sampling` explains them.

        Raises ValueError for values out of range.
        """
        n = check_count(n)
        how = self.check_sampling(**options)
        kept, rows = self.check_given(n, given)
        labels = self.sample_labels(n, labels)
        with evaluating(self):
            return self.draw_codes(
                Request(n, how, labels, kept, rows, generator, progress or (lambda done, total: None))
            )

    def draw_codes(self, request: Request) -> Tensor:
        """The codes `[n, h, w]` (int64) of a request; called without gradients and in evaluation mode."""
        raise NotImplementedError

    def check_sampling(self, **options: Any) -> Sampling:
        whole_number_in("top_k", options.get("top_k", 0), Range(0, self.num_codes))
        how = Sampling.of(options, self.sampling_options)
        if how.guidance != 1 and not self.label_drop:
            problem = "needs a prior of classes that was trained with label_drop above 0; leave it out"
            raise OptionError("guidance", options["guidance"], problem)
        return how

    def without_some(self, labels: Tensor | None) -> Tensor | None:
        """The labels `[B]` of a training step, some of them dropped; in evaluation all are kept."""
        if labels is None or not (self.training and self.label_drop):
            return labels
        dropped = shares.draw(torch.rand, labels.shape, device=labels.device) < self.label_drop
        return labels.masked_fill(dropped, self.num_classes)

    def with_and_without(self, labels: Tensor | None) -> Tensor | None:
        """The labels `[n]` and then n dropped labels, `[2n]`, for the logits that `guided` combines."""
        return None if labels is None else torch.cat([labels, torch.full_like(labels, self.num_classes)])

    def check_given(self, n: int, given: tuple[Tensor, int] | None) -> tuple[Tensor, int]:
        """Codes `[n, h, w]` (int64) and how many of their rows a sample keeps. Raises ValueError if out of range."""
        device = self.anchor.device
        if given is None:
            return torch.zeros(n, *self.grid, dtype=torch.int64, device=device), 0
        if not isinstance(given, tuple | list) or len(given) != 2:
            raise ValueError(f"given must be codes and the number of their rows to keep, not {kind_of(given)}")
        codes = check_codes(given[0], self.num_codes, self.grid).to(device)
        if len(codes) != n:
            raise ValueError(f"given codes must be those of {n} images, not of {len(codes)}")
        return codes, whole_number_in("rows", given[1], Range(0, self.grid[0]))

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
        """Like `check_labels`, for sampling. Also raises ValueError for labels that the prior would ignore."""
        if labels is not None and not self.num_classes:
            raise ValueError("this prior is not conditional and takes no labels")
        return self.check_labels(n, labels.cpu() if isinstance(labels, Tensor) else labels)


def check_count(n: Any) -> int:
    """Check a number of samples. Raises `OptionError`, a ValueError, unless it is a whole number from 0 up."""
    return whole_number_in("n", n, Range(0))


def uniform_numbers(*shape: int, generator: torch.Generator | None, device: torch.device) -> Tensor:
    """Numbers from 0 to 1, drawn where the generator is, so that one seed gives the same codes on every device."""
    return torch.rand(*shape, generator=generator, device=generator.device if generator else device).to(device)


def guided(logits: Tensor, guidance: float) -> Tensor:
    """Logits `[n, ...]`, given `[2n, ...]` of n examples with their labels and without (2207.12598, eq. 6)."""
    conditional, unconditional = logits.chunk(2)
    return unconditional + guidance * (conditional - unconditional)


def draw(logits: Tensor, uniform: Tensor, how: Sampling = Sampling()) -> Tensor:
    """Codes `[B]` from logits `[B, K]`: the inverse distribution function at uniform numbers `[B]`.

    At temperature 0, the likeliest codes. Among equally likely ones, the first are kept by top_k and top_p.
    """
    if how.temperature == 0:
        return logits.argmax(1)
    device = logits.device
    if device.type == "mps":  # has no float64
        logits, uniform = logits.cpu(), uniform.cpu()
    logits = logits.double()
    if 0 < how.top_k < logits.shape[1]:
        likeliest = logits.argsort(dim=1, descending=True, stable=True)[:, : how.top_k]
        logits = torch.full_like(logits, -torch.inf).scatter(1, likeliest, logits.gather(1, likeliest))
    logits = (logits - logits.amax(1, keepdim=True)) / how.temperature  # the largest stays finite at any temperature
    p = logits.softmax(1)
    if how.top_p < 1:
        ordered, order = p.sort(dim=1, descending=True, stable=True)
        likelier = ordered.cumsum(1) - ordered  # the probability of all codes before
        p = torch.zeros_like(p).scatter(1, order, ordered.where(likelier < how.top_p, 0))
    cumulative = p.cumsum(1)
    reached = uniform.double().unsqueeze(1) * cumulative[:, -1:]
    return (cumulative <= reached).sum(1).clamp(max=logits.shape[1] - 1).to(device)
