"""Stage one: an autoencoder and an objective as one module that the training loop can train.

B batch, C channels, H W pixels, h w code grid.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vqvae import distributed, metrics, shares
from vqvae.autoencoder import Autoencoder, unit_range
from vqvae.batch_norm import statistics_kept
from vqvae.contracts import Objective, Trainable, TrainOutput
from vqvae.evaluation import facts_of


class AutoencoderTraining(Trainable):
    """Batches of images to a loss and metrics."""

    monitor = "neg_elbo"
    headline = (
        "mse", "psnr", "perplexity", "active_codes", "active_units", "neg_elbo", "bits_per_dim", "commitment", "nmse"
    )  # fmt: skip

    def __init__(self, model: Autoencoder, objective: Objective, *, fitted: bool = False):
        """`fitted`: whether the bottleneck is already initialized, from a trained model."""
        super().__init__()
        objective.check(model)
        self.model, self.objective, self.fitted = model, objective, fitted

    def forward(self, images: Tensor, labels: Tensor | None, step: int) -> TrainOutput:
        """The loss and metrics of a batch of images `[B, C, H, W]` (uint8, or float points)."""
        model = self.model
        self.objective.freeze(model, step)
        elbo = model.elbo(unit_range(images), labels, step, for_prior=self.objective.for_prior)
        loss = self.objective(elbo, model, step)
        with torch.no_grad():
            shown = model.likelihood.center(elbo.params)
            examples = metrics.Examples(
                elbo.log_prior, elbo.log_likelihood, elbo.log_posterior, elbo.x, shown, model.shows_images,
                relaxed=self.training and model.bottleneck.relaxed,
            )  # fmt: skip
            monitored = {name: value.mean() for name, value in metrics.of_examples(examples, monitored=True).items()}
            nats = monitored["reconstruction_nats"] - model.likelihood.log_normalizer
            monitored |= {"loss": loss, "reconstruction": nats / model.dimensions, **elbo.latent.stats}
            if model.discrete is not None and model.discrete.counted:
                monitored["usage"] = model.discrete.usage(elbo.latent.need_codes())
        return TrainOutput(loss, {name: value.detach() for name, value in monitored.items()})

    def of_batch(self, monitored: dict[str, Tensor]) -> dict[str, Tensor]:
        """The metrics of a batch, with the perplexity of its code usage."""
        if "usage" not in monitored:
            return monitored
        return monitored | {"batch_perplexity": metrics.perplexity(monitored["usage"])}

    def summary(self, means: dict[str, Tensor]) -> dict[str, float]:
        """Metrics averaged over steps, as plain numbers to print; the usage vector becomes perplexity and a count."""
        means = dict(means)
        usage = means.pop("usage", None)
        numbers = {name: float(value) for name, value in means.items()}
        split = metrics.Split(numbers, facts_of(self.model), usage)
        return numbers | metrics.of_split(split, monitored=True)

    @torch.no_grad()
    def initialize(self, batches: Callable[[int], Tensor]) -> None:
        """Let the bottleneck fit its start to features; `batches(n)` gives n training images."""
        model = self.model
        wanted = model.bottleneck.start_vectors
        if not wanted or self.fitted:
            return
        h, w = model.bottleneck.grid
        tiles = batches(-(-wanted // (h * w))).split(128)
        # In training mode: with batch norm's first running statistics, features would have another scale than later.
        with statistics_kept(model):
            features = torch.cat([self._features(tile) for tile in tiles])
        model.bottleneck.initialize(distributed.share(features))

    def _features(self, images: Tensor) -> Tensor:
        """The features `[B, channels, h, w]` of images, which processes share."""
        with shares.sharing(len(images)) as batch:
            return distributed.gather_rows(self.model.features(unit_range(images[batch.rows])))

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        return self.objective.parameter_groups(self.model, weight_decay)

    def saved_state(self) -> dict[str, Any]:
        """The state of this module in a checkpoint."""
        return {"model": self.model.state_dict(), "objective": self.objective.state_dict()}

    def restore_state(self, content: dict[str, Any]) -> None:
        self.model.load_state_dict(content["model"])
        self.objective.load_state_dict(content["objective"])
