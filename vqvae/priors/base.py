"""Base class of all priors."""

import torch
from torch import Tensor, nn


class BasePrior(nn.Module):
    """A distribution over latents on a grid (h, w). Members implement `log_prob` and `sample` of `contracts.Prior`."""

    anchor: Tensor  # scalar; samples have its device and dtype

    def __init__(self, grid: tuple[int, int]):
        super().__init__()
        self.grid = (grid[0], grid[1])
        self.register_buffer("anchor", torch.zeros(()), persistent=False)
