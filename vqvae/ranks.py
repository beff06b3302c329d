"""Several processes that train one model: `torchrun --nproc-per-node 2 train.py ...`, one GPU each, or on the CPU.

Every process holds the whole model and data, takes its share of every batch, and has everything that is learnt from a
batch reduced over all of them, so that their weights stay the same bit for bit. The first (rank 0) alone writes.
What is no mean over examples is of each share alone: batch norm's statistics, the floor of free bits.
Everything here does nothing, and costs nothing, where there is one process.
"""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vqvae.errors import UserError

Result = TypeVar("Result")
PATIENCE = timedelta(hours=6)  # the others wait while the first evaluates, draws, or reads pictures


def rank() -> int:
    return dist.get_rank() if _several() else 0


def world() -> int:
    return dist.get_world_size() if _several() else 1


def _several() -> bool:
    return dist.is_available() and dist.is_initialized()


def start(device: torch.device) -> None:
    """Join the other processes that torchrun has started, if any; from here the first alone prints."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1 or _several():
        return
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {device.type}: cannot be shared by {count} processes; use --device cpu, or one")
    if device.type == "cuda":
        here, there = int(os.environ.get("LOCAL_WORLD_SIZE", count)), torch.cuda.device_count()
        if here > there:
            raise UserError(f"--device cuda: {here} processes but {there} GPUs; start as many, or use --device cpu")
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    # decisions of the host go by gloo even on GPUs, so that no process waits for its device to take them
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
    if rank():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (to the end of the process)


def stop() -> None:
    if _several():
        dist.destroy_process_group()


def share(batch: Tensor) -> Tensor:
    """This process's rows of a batch, which may be one fewer than another's."""
    return batch.tensor_split(world())[rank()]


def average(module: nn.Module, metrics: dict[str, Tensor], weight: float) -> dict[str, Tensor]:
    """Means over the processes of the gradients, in place, and of the metrics, in one message.

    `weight` is this process's share of the batch: means over unequal shares are then means over the batch.
    """
    if world() == 1:
        return metrics
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    values = [*gradients, *metrics.values()]
    flat = sum_over(weight * torch.cat([value.float().reshape(-1) for value in values]))
    parts = flat.split([value.numel() for value in values])
    means = [part.view(value.shape) for part, value in zip(parts, values, strict=True)]
    for gradient, mean in zip(gradients, means, strict=False):
        gradient.copy_(mean)
    return dict(zip(metrics, means[len(gradients) :], strict=True))


def sum_over(tensor: Tensor) -> Tensor:
    """The sum of the processes' tensors, in every process the same bits."""
    if world() > 1:
        tensor = tensor.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(tensor)
    return tensor


def broadcast(tensor: Tensor) -> Tensor:
    """The first process's tensor; the others' must have its shape and type."""
    if world() > 1:
        tensor = tensor.clone(memory_format=torch.contiguous_format)
        dist.broadcast(tensor, src=0)
    return tensor


def gather_rows(rows: Tensor) -> Tensor:
    """All processes' rows `[N_rank, ...]` in the order of ranks, of which each may bring another number."""
    if world() == 1:
        return rows
    counts = [torch.zeros((), dtype=torch.int64) for _ in range(world())]
    dist.all_gather(counts, torch.tensor(len(rows)))
    # processes can only exchange equal shapes: all send as many rows as the longest has
    padded = rows.new_zeros(max(map(int, counts)), *rows.shape[1:])
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return torch.cat([part[: int(count)] for part, count in zip(parts, counts, strict=True)])


def any_of(*wishes: bool) -> tuple[bool, ...]:
    """Each wish, whether some process has it: what depends on clocks or signals must be decided alike."""
    if world() == 1:
        return wishes
    votes = torch.tensor(wishes, dtype=torch.uint8)  # on the CPU, whatever computes
    dist.all_reduce(votes, op=dist.ReduceOp.MAX)
    return tuple(map(bool, votes.tolist()))


def barrier() -> None:
    any_of(False)


def on_first(work: Callable[[], Result]) -> Result:
    """What `work` gives when the first process does it (nothing on a device); its `UserError` is raised everywhere."""
    if world() == 1:
        return work()
    outcome: list = [None, None]
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
    """The others begin when the first has finished, so that they find the files that it downloads or converts."""
    if rank():
        barrier()
    try:
        yield
    finally:
        if rank() == 0:
            barrier()
