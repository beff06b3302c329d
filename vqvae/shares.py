"""A batch in shares: several processes compute one share each, or one process computes several, one after another.

A training step is the same however its batch is shared, up to rounding. Noise is drawn for the whole batch, and each
share takes its rows of the noise. Quantities of all examples (codebook sums, usage, batch norm, entropies) are summed
over all shares. If one process computes the whole batch, every function here does nothing and costs nothing.

A share's loss is its mean, weighted by its part of the batch. So the gradients of all shares add up to the batch's.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vqvae import distributed

Forward = Callable[[slice], tuple[Tensor, dict[str, Tensor]]]  # rows of the batch to their loss and metrics


class Sums:
    """Running sums over shares, one for each call that a share makes, in order."""

    def __init__(self) -> None:
        self.totals: list[Tensor] = []
        self.calls = 0  # of the current share

    def add(self, value: Tensor) -> Tensor:
        """Add a share's value to the sum of this call; returns the sum so far."""
        self.calls += 1
        if self.calls > len(self.totals):
            self.totals.append(value)
        else:
            self.totals[self.calls - 1] = self.totals[self.calls - 1] + value
        return self.totals[self.calls - 1]

    def next(self) -> Tensor:
        self.calls += 1
        return self.totals[self.calls - 1]


class Batch:
    """A batch of `total` examples, in `parts` shares for each process, and what is known of the whole."""

    def __init__(self, total: int, parts: int):
        self.total, self.parts = total, parts
        least, longer = divmod(total, distributed.world() * parts)  # the first shares have one example more
        numbers = range(distributed.rank() * parts, (distributed.rank() + 1) * parts + 1)
        stops = [number * least + min(number, longer) for number in numbers]
        self.shares = [slice(*pair) for pair in itertools.pairwise(stops)]
        self.part = 0  # the current share
        self.sums = Sums()  # of `collect`
        self.means = Sums()  # of `mean_over`; over all shares once `rehearsed`
        self.rehearsing = self.rehearsed = False

    @property
    def rows(self) -> slice:
        """The examples of the current share."""
        return self.shares[self.part]

    @property
    def size(self) -> int:
        return self.rows.stop - self.rows.start

    def each(self) -> Iterator[slice]:
        """Go through the shares of this process."""
        self.sums = Sums()
        for part in range(self.parts):
            self.part = part
            self.sums.calls = self.means.calls = 0
            yield self.rows

    def descend(self, forward: Forward) -> dict[str, Tensor]:
        totals: dict[str, Tensor] = {}
        for rows in self.each():
            weight = self.size / self.total
            loss, metrics = forward(rows)
            (weight * loss).backward()
            for name, value in {**metrics, "loss": loss.detach()}.items():
                value = value if value.ndim else weight * value
                totals[name] = totals[name] + value if name in totals else value
        return totals

    @torch.no_grad()
    def rehearse(self, forward: Forward) -> None:
        """Find the means over the whole batch on which the loss depends."""
        self.rehearsing = True
        for rows in self.each():
            forward(rows)
        self.means.totals = [distributed.sum_over(total) for total in self.means.totals]
        self.rehearsing, self.rehearsed = False, True


class Incomplete(Exception):
    """The loss of a share depends on shares that are not computed yet."""


_batch: Batch | None = None
_seed = 0
_generators: dict[str, torch.Generator] = {}


@contextmanager
def sharing(total: int, parts: int = 1) -> Iterator[Batch]:
    """Inside, the model computes shares of one batch of `total` examples, `parts` for each process."""
    global _batch
    outer, batch = _batch, Batch(total, parts)
    _batch = batch if distributed.world() * parts > 1 else None
    try:
        yield batch
    finally:
        _batch = outer


def batches(size: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """This process's share of each batch of `size` rows of tensors `[N, ...]`, as far as it gets one."""
    for parts in zip(*(tensor.split(size) for tensor in tensors), strict=True):
        with sharing(len(parts[0])) as batch:
            if batch.size:
                yield tuple(part[batch.rows] for part in parts)


def descend(forward: Forward, total: int, parts: int = 1) -> dict[str, Tensor]:
    """Add the gradient of a batch's loss to the parameters' `grad`; returns the metrics and the `loss`.

    `forward(rows)` gives the loss and the metrics of rows of the batch: scalars are means over the rows, tensors with
    axes are sums. With several processes, gradients and metrics are those of this one, and have to be summed. A loss
    that depends on means over the whole batch needs a forward pass more, if `parts` > 1.
    """
    if distributed.world() * parts == 1:
        loss, metrics = forward(slice(total))
        loss.backward()
        return {**metrics, "loss": loss.detach()}
    with sharing(total, parts) as batch:
        try:
            return batch.descend(forward)
        except Incomplete:  # in the first share, before any gradient
            batch.rehearse(forward)
            return batch.descend(forward)


# noise


def seed(number: int) -> None:
    """Seed the noise of the whole batch, which is the same in all processes."""
    global _seed
    _seed = number
    _generators.clear()


def number() -> int:
    """The number of the current share among those of all processes."""
    return distributed.rank() if _batch is None else distributed.rank() * _batch.parts + _batch.part


def draw(
    sample: Callable[..., Tensor], shape: Sequence[int], *, dim: int = 0, device: torch.device, **options: Any
) -> Tensor:
    """The current share's part of noise from `sample`, such as torch.rand; `shape` has its examples along `dim`.

    With several draws for each example, the first draws of all examples come first, as in `[S*B, ...]`.
    """
    if _batch is None:
        return sample(tuple(shape), device=device, **options)
    whole_shape = (*shape[:dim], whole(shape[dim]), *shape[dim + 1 :])
    return mine(sample(whole_shape, device=device, generator=generator(device), **options), dim)


def whole(rows: int) -> int:
    """How many rows the whole batch has, if the current share has `rows`."""
    return rows if _batch is None else rows // _batch.size * _batch.total


def mine(rows: Tensor, dim: int = 0) -> Tensor:
    """The current share's part of the whole batch's rows `[S*B, ...]`, along `dim`."""
    if _batch is None:
        return rows
    unflat = rows.unflatten(dim, (-1, _batch.total))
    return unflat.narrow(dim + 1, _batch.rows.start, _batch.size).flatten(dim, dim + 1)


def generator(device: torch.device) -> torch.Generator | None:
    """The generator of the whole batch's noise; None for torch's own."""
    if _batch is None:
        return None
    if device.type not in _generators:
        _generators[device.type] = torch.Generator(device).manual_seed(_seed)
    return _generators[device.type]


def draw_alike(sample: Callable[..., Tensor], shape: Sequence[int], *, device: torch.device, **options: Any) -> Tensor:
    """`sample(shape)`, the same for all shares."""
    if _batch is None:
        return distributed.broadcast(sample(tuple(shape), device=device, **options))
    return sample(tuple(shape), device=device, generator=generator(device), **options)


def pick(rows: Tensor, count: int) -> Tensor:
    """Random rows `[count, ...]` of the whole batch, given the current share's rows `[N, ...]`.

    Rows of other shares are zero here; the sum over the shares has all. Rows of one example must follow each other.
    """
    if _batch is None:
        chosen = rows[torch.randint(len(rows), (count,), device=rows.device)]
        return chosen if distributed.rank() == 0 else torch.zeros_like(chosen)
    first = len(rows) // _batch.size * _batch.rows.start
    index = draw_alike(partial(torch.randint, whole(len(rows))), (count,), device=rows.device)
    here = (index >= first) & (index < first + len(rows))
    return rows[(index - first).clamp(0, len(rows) - 1)] * here.view(-1, *[1] * (rows.ndim - 1))


# sums


def collect(*tensors: Tensor) -> tuple[Tensor, ...] | None:
    """The sums of tensors over all shares, in one message; None until the last share of this process is added."""
    if _batch is None and distributed.world() == 1:
        return tensors
    if _batch and _batch.rehearsing:
        return None
    flat = distributed.flatten(tensors)
    if _batch:
        flat = _batch.sums.add(flat)
        if _batch.part < _batch.parts - 1:
            return None
    return distributed.unflatten(distributed.sum_over(flat), tensors)


def mean_over(mean: Tensor, rows: int) -> Tensor:
    """The mean over the whole batch, given the mean over the `rows` of the current share, which gets the gradient.

    Only for a loss that is the same function of the mean in all shares: then no gradient has to be exchanged.
    """
    if _batch is None and distributed.world() == 1:
        return mean
    flat = torch.cat([rows * mean.detach().flatten(), mean.new_tensor([rows])])
    if _batch is None or _batch.parts == 1:
        total = distributed.sum_over(flat)
    elif _batch.rehearsed:
        total = _batch.means.next()
    elif _batch.rehearsing:
        _batch.means.add(flat)
        return mean
    else:
        raise Incomplete
    return (total[:-1] / total[-1]).view_as(mean) + (mean - mean.detach())
