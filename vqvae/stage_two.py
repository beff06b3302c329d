"""Stage two: a prior trained on the codes of a frozen autoencoder.

The training loop sees a thin wrapper. Checkpoints contain the whole autoencoder with its prior replaced, so the result
is sampled, evaluated and plotted like any other model.

B batch, N images, h w code grid, K codes.
"""

import contextlib
import hashlib
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vqvae import distributed, metrics
from vqvae.archives import read_arrays
from vqvae.autoencoder import Autoencoder, unit_range
from vqvae.checkpoint import weights_checksum
from vqvae.contracts import Discrete, Trainable, TrainOutput, evaluating
from vqvae.data.base import fingerprint
from vqvae.evaluation import evaluate_prior, facts_of, log_prior_of_codes, seeded
from vqvae.files import NotWritten, open_file, whole_file
from vqvae.optimizer import decay_groups
from vqvae.progress import images_bar


class PriorTraining(Trainable):
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

    def evaluate(self, codes: Tensor, labels: Tensor, seed: int = 0) -> dict[str, Any]:
        """The prior's metrics on held-out codes `[N, h, w]`; `seed` is that of a prior which estimates a bound."""
        return evaluate_prior(self.model, codes, labels, conditional=self.conditional, seed=seed)

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        return decay_groups(self, weight_decay)

    def saved_state(self) -> dict[str, Any]:
        """The whole autoencoder, of which this module trains the prior."""
        return {"model": self.model.state_dict(), "objective": {}}


def extract_codes(
    model: Autoencoder, images: Tensor, cache: Path, *, batch_size: int | None = None, parts: int = 1
) -> Tensor:
    """The codes `[N, h, w]` (int32) of images `[N, C, H, W]`, computed once and cached.

    With several parts of the data, `images` are those of this process's part, and the result has the codes of all
    parts, one after the other; each part must have N images.

    If the posterior is a distribution, each image gets one draw from it, because -ELBO scores the prior on draws, and
    the most likely codes are less varied. A cache that is damaged, or was made with other weights or from other images,
    is replaced. If it cannot be written, a warning says so. Several processes share the images, and the first one
    writes the cache.
    """
    bottleneck = model.bottleneck
    if not isinstance(bottleneck, Discrete):
        raise ValueError("extract_codes needs discrete codes; this model's latent is continuous")
    seen = " ".join(distributed.of_parts(fingerprint(images), parts))
    source = f"{weights_checksum(model)} {seen}{' draws' if bottleneck.stochastic else ''}"
    cached = None
    with contextlib.suppress(Exception):  # a damaged archive raises anything
        cached = _cached(cache, source, (parts * len(images), *bottleneck.grid), bottleneck.num_codes)
    (missing,) = distributed.any_of(cached is None)
    if cached is not None and not missing:
        return cached
    mine = distributed.share(images, parts)
    if bottleneck.stochastic:  # one process draws, so that the draws do not depend on the number of processes
        mine = images if distributed.first_of_part(parts) else images[:0]
    found = [torch.empty(0, *bottleneck.grid, dtype=torch.int32)]
    with torch.no_grad(), evaluating(model), seeded(0, model.device), images_bar(len(mine), "encoding") as bar:
        for tile in mine.split(batch_size or model.at_once):
            if len(tile):
                found.append(_codes(model, tile).to("cpu", torch.int32))
                bar.update(len(tile))
    codes = distributed.gather_rows(torch.cat(found))
    smallest = np.min_scalar_type(bottleneck.num_codes - 1)

    def store() -> None:
        try:
            store_codes(cache, codes.numpy().astype(smallest), source)
        except NotWritten:  # of another user, or on a disk that may only be read
            warnings.warn(f"{cache} cannot be written: the next prior will encode the images again", stacklevel=2)

    distributed.on_first(store)
    return codes


def _codes(model: Autoencoder, images: Tensor) -> Tensor:
    """Codes `[B, h, w]` of images `[B, C, H, W]`: drawn where the posterior is a distribution."""
    if not model.bottleneck.stochastic:
        return model.encode(images)
    x = unit_range(images.to(model.device))
    return model.bottleneck(model.features(x), 0).need_codes()


def store_codes(cache: Path, codes: np.ndarray, source: str) -> None:
    """Write codes `[N, h, w]`, the checksums of the weights and images that they come from, and their own."""
    with whole_file(cache) as file:
        np.savez_compressed(file, codes=codes, source=source, sha256=_checksum(codes, source))


def _cached(cache: Path, source: str, shape: tuple[int, ...], num_codes: int) -> Tensor:
    """The codes (int32) in a cache. Raises any exception for one that is damaged or has another source."""
    with open_file(cache) as file:
        stored = read_arrays(file, ("codes", "source", "sha256"))
    codes = stored["codes"]
    if str(stored["source"]) != source or str(stored["sha256"]) != _checksum(codes, source):
        raise ValueError("codes of something else, or damaged ones")
    if codes.shape != shape or codes.dtype.kind != "u" or int(codes.max()) >= num_codes:
        raise ValueError("not the codes of this bottleneck")
    return torch.from_numpy(codes.astype(np.int32))


def _checksum(codes: np.ndarray, source: str) -> str:
    return hashlib.sha256(f"{codes.dtype} {codes.shape} {source}".encode() + codes.tobytes()).hexdigest()
