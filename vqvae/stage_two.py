"""Stage two: a prior trained on the codes of a frozen autoencoder.

What the loop trains is a thin wrapper; what it saves is the whole autoencoder with its prior slot replaced, so that
the result samples, evaluates and draws as any other model does.

B batch, h w code grid, K codes.
"""

import hashlib
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from vqvae.autoencoder import Autoencoder, Step
from vqvae.latent import Latent


class PriorTraining(nn.Module):
    """The loop's view of a prior: batches of codes `[B, h, w]` to nats per code."""

    headline = {"bits_per_code": "{:.4f} bits/code", "perplexity": "perplexity {:.1f}"}
    monitor = "nats"

    def __init__(self, autoencoder: Autoencoder, *, conditional: bool):
        super().__init__()
        autoencoder.requires_grad_(False).eval()
        autoencoder.prior.requires_grad_(True)
        self.autoencoder, self.conditional = autoencoder, conditional

    def train(self, mode: bool = True) -> "PriorTraining":
        self.training = mode
        self.autoencoder.prior.train(mode)  # the frozen parts stay as they were evaluated
        return self

    def forward(self, codes: Tensor, labels: Tensor, step: int) -> Step:
        loss = self._nats(codes, labels).mean() / codes[0].numel()
        return Step(loss, {"loss": loss.detach()})

    def summary(self, means: dict[str, Tensor]) -> dict[str, float]:
        nats = float(means["loss"])
        return {"loss": nats, "bits_per_code": nats / math.log(2), "perplexity": math.exp(nats)}

    @torch.no_grad()
    def evaluate(self, codes: Tensor, labels: Tensor, batch_size: int = 256) -> dict[str, Any]:
        """Held-out cost of codes `[N, h, w]`: `nats` per image with its standard error, and nats and bits per code.

        perplexity is exp(nats per code); `uniform_bits_per_code` is log2 K, what a prior that knows nothing pays.
        """
        training = self.training
        self.eval()
        parts = zip(codes.split(batch_size), labels.split(batch_size), strict=True)
        device = self.autoencoder.device
        nats = torch.cat([self._nats(c.to(device), y.to(device)).cpu().double() for c, y in parts])
        self.train(training)
        per_code = float(nats.mean()) / codes[0].numel()
        return {
            "nats": float(nats.mean()),
            "nats_se": float(nats.std() / math.sqrt(len(nats))),
            "nats_per_code": per_code,
            "bits_per_code": per_code / math.log(2),
            "uniform_bits_per_code": math.log2(self.autoencoder.bottleneck.num_codes),
            "bits_per_dim": float(nats.mean()) / (self.autoencoder.dimensions * math.log(2)),
            "perplexity": math.exp(per_code),
        }

    def _nats(self, codes: Tensor, labels: Tensor) -> Tensor:
        latent = Latent.of_codes(codes.long())
        with torch.autocast(codes.device.type, enabled=torch.is_autocast_enabled(codes.device.type)):
            return -self.autoencoder.prior.log_prob(latent, labels if self.conditional else None)

    # a checkpoint holds the autoencoder, not this wrapper

    def state_dict(self, *args: Any, **keywords: Any) -> dict[str, Any]:
        return self.autoencoder.state_dict(*args, **keywords)

    def load_state_dict(self, state: dict[str, Any], *args: Any, **keywords: Any):
        return self.autoencoder.load_state_dict(state, *args, **keywords)


def weights_checksum(model: nn.Module) -> str:
    """16 hexadecimal digits of the SHA-256 of what turns pictures into codes and back: all weights but the prior's."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if not name.startswith("prior."):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def extract_codes(model: Autoencoder, images: Tensor, cache: Path, *, batch_size: int = 256) -> Tensor:
    """The codes `[N, h, w]` (int32) of images `[N, C, H, W]`, computed once and cached with the weights' checksum.

    A cache of other weights, or of another number of images, is made anew.
    """
    checksum = weights_checksum(model)
    if cache.exists():
        try:
            with np.load(cache, allow_pickle=False) as held:
                if str(held["weights"]) == checksum and len(held["codes"]) == len(images):
                    return torch.from_numpy(held["codes"].astype(np.int32))
        except (OSError, ValueError, KeyError, EOFError):
            pass  # a damaged cache is as good as none
    tiles = tqdm(images.split(batch_size), desc="codes", unit="batch", disable=None, leave=False)
    codes = torch.cat([model.encode(tile).to("cpu", torch.int32) for tile in tiles])
    smallest = np.uint8 if model.bottleneck.num_codes <= 256 else np.uint16
    if model.bottleneck.num_codes > 1 << 16:
        smallest = np.int32
    cache.parent.mkdir(parents=True, exist_ok=True)
    partial = cache.with_name(cache.name + ".partial")
    with open(partial, "wb") as file:
        np.savez_compressed(file, codes=codes.numpy().astype(smallest), weights=checksum)
    os.replace(partial, cache)
    return codes
