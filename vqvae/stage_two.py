"""Stage two: a prior trained on the codes of a frozen autoencoder.

The training loop sees a thin wrapper. Checkpoints hold the whole autoencoder with its prior replaced, so the result
samples, evaluates and draws as any other model does.

B batch, N images, h w code grid, K codes.
"""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from vqvae import metrics
from vqvae.autoencoder import Autoencoder
from vqvae.checkpoint import weights_checksum
from vqvae.contracts import Discrete, TrainOutput
from vqvae.evaluation import evaluate_prior, facts_of, log_prior_of_codes
from vqvae.files import whole_file
from vqvae.optimizer import decay_groups


class PriorTraining(nn.Module):
    """Batches of codes `[B, h, w]` to nats per code."""

    monitor = "prior_nats"
    headline = ("bits_per_code", "code_perplexity")

    def __init__(self, model: Autoencoder, *, conditional: bool):
        super().__init__()
        model.requires_grad_(False).eval()
        model.prior.requires_grad_(True)
        self.model, self.conditional = model, conditional

    def train(self, mode: bool = True) -> "PriorTraining":
        """Switch the prior's mode; the frozen parts stay in evaluation mode."""
        self.training = mode
        self.model.prior.train(mode)
        return self

    def forward(self, codes: Tensor, labels: Tensor, step: int) -> TrainOutput:
        nats = -log_prior_of_codes(self.model, codes, labels, self.conditional).mean()
        loss = nats / codes[0].numel()
        return TrainOutput(loss, {"loss": loss.detach(), "prior_nats": nats.detach()})

    def summary(self, means: dict[str, Tensor]) -> dict[str, float]:
        """Metrics averaged over steps, as plain numbers."""
        numbers = {name: float(value) for name, value in means.items()}
        return numbers | metrics.of_split(metrics.Split(numbers, facts_of(self.model)), monitored=True)

    def evaluate(self, codes: Tensor, labels: Tensor) -> dict[str, Any]:
        """The prior's metrics on held-out codes `[N, h, w]`."""
        return evaluate_prior(self.model, codes, labels, conditional=self.conditional)

    def initialize(self, batches: Callable[[int], Tensor]) -> None:
        """Priors start from their random weights."""

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        return decay_groups(self, weight_decay)

    def saved_state(self) -> dict[str, Any]:
        """The whole autoencoder, of which this module trains the prior."""
        return {"model": self.model.state_dict(), "objective": {}}


def extract_codes(model: Autoencoder, images: Tensor, cache: Path, *, batch_size: int = 256) -> Tensor:
    """The codes `[N, h, w]` (int32) of images `[N, C, H, W]`, computed once and cached with the weights' checksum.

    A cache made with other weights, or from another number of images, is replaced.
    """
    bottleneck, checksum = model.bottleneck, weights_checksum(model)
    if not isinstance(bottleneck, Discrete):
        raise ValueError("extract_codes needs discrete codes; this model's latent is continuous")
    # a damaged cache is computed again
    with contextlib.suppress(OSError, ValueError, KeyError, EOFError), np.load(cache, allow_pickle=False) as stored:
        if str(stored["weights"]) == checksum and len(stored["codes"]) == len(images):
            return torch.from_numpy(stored["codes"].astype(np.int32))
    tiles = tqdm(images.split(batch_size), desc="codes", unit="batch", disable=None, leave=False)
    codes = torch.cat([model.encode(tile).to("cpu", torch.int32) for tile in tiles])
    smallest = np.min_scalar_type(bottleneck.num_codes - 1)
    with whole_file(cache) as file:
        np.savez_compressed(file, codes=codes.numpy().astype(smallest), weights=checksum)
    return codes
