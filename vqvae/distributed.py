"""Several processes that train one model: `torchrun --nproc-per-node 2 train.py ...`, one GPU each, or on the CPU.

Every process holds the whole model and the whole data set, and takes its share of every batch. Whatever is learned
from a batch is reduced over all processes, so their weights stay equal bit for bit. Only the first (rank 0) writes.
Two things are computed from each share only: batch norm's statistics and the threshold of free bits.
With one process, every function here does nothing and costs nothing.
"""

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from vqvae.errors import OptionError, UserError

Result = TypeVar("Result")
TIMEOUT = timedelta(hours=6)  # the others wait while the first evaluates, draws, or reads images


def rank() -> int:
    return dist.get_rank() if _several() else 0


def world() -> int:
    return dist.get_world_size() if _several() else 1


def _several() -> bool:
    return dist.is_available() and dist.is_initialized()


def start(device: torch.device) -> None:
    """Join the other processes that torchrun started, if any; from here on only the first prints."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1 or _several():
        return
    if device.type not in ("cpu", "cuda"):
        raise OptionError("", "device", device.type, f"{count} processes cannot share it; use cpu, or one process")
    if device.type == "cuda":
        here, there = int(os.environ.get("LOCAL_WORLD_SIZE", count)), torch.cuda.device_count()
        if here > there:
            raise OptionError("", "device", "cuda", f"{here} processes but {there} GPUs; start as many, or use cpu")
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    # decisions of the host use gloo even with GPUs, so that no process waits for its device to take them
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
    if rank():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (until the process ends)


def stop() -> None:
    if _several():
        dist.destroy_process_group()


def share(batch: Tensor) -> Tensor:
    """This process's rows of a batch; another process may have one row more."""
    return batch.tensor_split(world())[rank()]


def average(parameters: Iterable[Tensor], metrics: dict[str, Tensor], weight: float) -> dict[str, Tensor]:
    """Average the gradients (in place) and the metrics over the processes, in one message.

    `weight` is this process's share of the batch, so that means over unequal shares become means over the batch.
    """
    if world() == 1:
        return metrics
    gradients = [p.grad for p in parameters if p.grad is not None]
    values = [*gradients, *metrics.values()]
    flat = sum_over(weight * torch.cat([value.float().reshape(-1) for value in values]))
    parts = flat.split([value.numel() for value in values])
    means = [part.view(value.shape) for part, value in zip(parts, values, strict=True)]
    for gradient, mean in zip(gradients, means, strict=False):
        gradient.copy_(mean)
    return dict(zip(metrics, means[len(gradients) :], strict=True))


def sum_over(tensor: Tensor) -> Tensor:
    """The sum of the processes' tensors, with the same bits in every process."""
    if world() > 1:
        tensor = tensor.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(tensor)
    return tensor


def broadcast(tensor: Tensor) -> Tensor:
    """The first process's tensor; those of the others must have its shape and type."""
    if world() > 1:
        tensor = tensor.clone(memory_format=torch.contiguous_format)
        dist.broadcast(tensor, src=0)
    return tensor


def gather_rows(rows: Tensor) -> Tensor:
    """The rows `[N_rank, ...]` of all processes in order of rank; N may differ between them."""
    if world() == 1:
        return rows
    counts = [torch.zeros((), dtype=torch.int64) for _ in range(world())]
    dist.all_gather(counts, torch.tensor(len(rows)))
    # processes can only exchange equal shapes: each sends as many rows as the longest has
    padded = rows.new_zeros(max(map(int, counts)), *rows.shape[1:])
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return torch.cat([part[: int(count)] for part, count in zip(parts, counts, strict=True)])


def any_of(*wishes: bool) -> tuple[bool, ...]:
    """For each wish, whether any process has it. Decisions that depend on clocks or signals must be taken alike."""
    if world() == 1:
        return wishes
    votes = torch.tensor(wishes, dtype=torch.uint8)  # on the CPU, wherever the model computes
    dist.all_reduce(votes, op=dist.ReduceOp.MAX)
    return tuple(map(bool, votes.tolist()))


def barrier() -> None:
    any_of(False)


def on_first(work: Callable[[], Result]) -> Result:
    """The result of `work`, done by the first process (nothing on a device); its `UserError` is raised everywhere."""
    if world() == 1:
        return work()
    outcome: list[Any] = [None, None]
    if rank() == 0:
        try:
            outcome[0] = work()
        except UserError as problem:
            outcome[1] = problem
    dist.broadcast_object_list(outcome, src=0, device=torch.device("cpu"))
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


@contextmanager
def first_goes_first() -> Iterator[None]:
    """Let the first process finish before the others begin, so that they find the files it downloads or converts."""
    if rank():
        barrier()
    try:
        yield
    finally:
        if rank() == 0:
            barrier()
