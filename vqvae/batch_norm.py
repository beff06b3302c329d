"""Batch norm with the statistics of the whole batch, even if several processes share the batch.

B batch, C channels, H W pixels.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqvae import distributed


class BatchNorm(nn.BatchNorm2d):
    """torch's BatchNorm2d (1502.03167), which in training uses the statistics of all processes' examples.

    So several processes train as one would, and their running statistics are equal. Shares may differ in size. Unlike
    torch's SyncBatchNorm, it works on any device.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    momentum: float

    def forward(self, x: Tensor) -> Tensor:
        """Normalize features `[B, C, H, W]`."""
        if not self.training or distributed.world() == 1:
            return super().forward(x)
        # as a decorator, this would import two seconds of torch's compiler into every program
        return torch.compiler.disable(self._shared)(x)

    def _shared(self, x: Tensor) -> Tensor:
        y, mean, variance, count = _Normalize.apply(x, self.weight, self.bias, self.eps)
        with torch.no_grad():
            self.num_batches_tracked.add_(1)
            self.running_mean.lerp_(mean.to(self.running_mean), self.momentum)
            self.running_var.lerp_((variance * count / (count - 1)).to(self.running_var), self.momentum)
        return y


@contextmanager
def statistics_kept(module: nn.Module) -> Iterator[None]:
    """Restore the running statistics of batch norm at the end of the block."""
    norms = [part for part in module.modules() if isinstance(part, nn.BatchNorm2d)]
    kept = [(buffer, buffer.clone()) for norm in norms for buffer in norm.buffers()]
    try:
        yield
    finally:
        for buffer, value in kept:
            buffer.copy_(value)


class _Normalize(torch.autograd.Function):
    """y = (x - m) / sqrt(v + eps) * weight + bias; also returns m `[C]`, v `[C]` and the number of vectors."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, ...]:
        here = x.new_zeros(3, x.shape[1], dtype=torch.float64)
        if count := x.numel() // x.shape[1]:  # a process may have no example of a small batch
            variance, mean = torch.var_mean(x.float() if x.itemsize < 4 else x, (0, 2, 3), correction=0)
            # in float64, where the difference of squares below loses nothing that counts
            mean, variance = mean.double(), variance.double()
            here = count * torch.stack([mean.new_ones(mean.shape), mean, variance + mean.square()])
        counts, sums, squares = distributed.sum_over(here)
        mean = sums / counts
        variance = (squares / counts - mean.square()).clamp(min=0)
        wide = weight.dtype
        ctx.save_for_backward(x, weight, mean.to(wide), (variance + eps).rsqrt().to(wide), counts[0])
        y = F.batch_norm(x, mean.to(wide), variance.to(wide), weight, bias, training=False, eps=eps)
        ctx.mark_non_differentiable(mean, variance, counts)
        return y, mean, variance, counts[0]

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor, None]:
        x, weight, mean, scale, count = ctx.saved_tensors
        normalized = (x - _per_channel(mean)) * _per_channel(scale)
        here = torch.stack([dy.sum((0, 2, 3), dtype=weight.dtype), (dy * normalized).sum((0, 2, 3))])
        of_mean, of_variance = (distributed.sum_over(here) / count).to(weight.dtype)
        dx = dy - _per_channel(of_mean) - normalized * _per_channel(of_variance)
        return (dx * _per_channel(scale * weight)).to(x.dtype), here[1], here[0], None


def _per_channel(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1)
