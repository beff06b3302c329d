"""An exponential moving average of all weights, which evaluation and checkpoints use instead of the last ones."""

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class AveragedWeights:
    """The average of a module's weights and buffers, a <- d a + (1 - d) w after every update.

    d is min(decay, (1 + n) / (10 + n)) at update n, so that the first weights are soon forgotten. A codebook's buffers
    match the weights of their step, so buffers are averaged too. Integer buffers keep their last value. A decay of 0
    averages nothing.
    """

    def __init__(self, module: nn.Module, decay: float, trained: Mapping[str, Tensor] | None = None):
        """Start the average from the module's weights.

        A checkpoint's weights are the averages. It stores the training weights, too: pass them as `trained`, and the
        module gets them.
        """
        self.module, self.decay = module, decay
        self.other = {name: tensor.clone() for name, tensor in self._tensors().items()}
        if trained is not None:
            for name, tensor in self._tensors().items():
                tensor.copy_(trained[name])

    def _tensors(self) -> dict[str, Tensor]:
        return {name: tensor.detach() for name, tensor in self.module.state_dict().items()} if self.decay else {}

    @torch.no_grad()
    def update(self, updates: int) -> None:
        """Add the module's weights to the average after update number `updates`, which counts from 0."""
        pairs = [(self.other[name], tensor) for name, tensor in self._tensors().items()]
        for average, tensor in pairs:
            if not tensor.is_floating_point():
                average.copy_(tensor)
        if floats := [pair for pair in pairs if pair[0].is_floating_point()]:
            decay = min(self.decay, (1 + updates) / (10 + updates))
            get_ema_multi_avg_fn(decay)([a for a, _ in floats], [w for _, w in floats], updates)

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """Exchange the weights for the averages within the block; `other` has the training weights meanwhile."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for name, tensor in self._tensors().items():
            kept = tensor.clone()
            tensor.copy_(self.other[name])
            self.other[name].copy_(kept)
