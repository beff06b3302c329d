"""The five slots put together: pixels -> encoder -> bottleneck -> decoder -> likelihood, and the prior beside it.

-ELBO = -log p(x|z) + log q(z|x) - log p(z), in nats per example, for every choice of members.

B batch, S samples, C channels, H W pixels, D code dimension, h w code grid.
"""

import contextlib
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vqvae.bottlenecks import BOTTLENECKS
from vqvae.bottlenecks.codebook import perplexity
from vqvae.errors import UserError
from vqvae.latent import Latent
from vqvae.likelihoods import LIKELIHOODS
from vqvae.members import Choice, Slot, build, find, signature
from vqvae.nets import NETS
from vqvae.priors import PRIORS
from vqvae.schedules import Schedule

SLOTS = {
    "nets": Slot("--nets", NETS),
    "bottleneck": Slot("--bottleneck", BOTTLENECKS),
    "prior": Slot("--prior", PRIORS),
    "likelihood": Slot("--likelihood", LIKELIHOODS),
}


class Step(NamedTuple):
    """What the training loop asks of a module: a loss to descend, and monitors to average over steps."""

    loss: Tensor  # scalar
    metrics: dict[str, Tensor]  # detached; scalars, or vectors that `summary` turns into scalars


class Elbo(NamedTuple):
    """The three terms of the bound for each example of a batch, and what was drawn on the way.

    Bottlenecks that draw S samples in training repeat the batch, sample by sample.
    """

    log_likelihood: Tensor  # [S*B] nats, log p(x|z)
    log_posterior: Tensor  # [S*B] nats, log q(z|x)
    log_prior: Tensor  # [S*B] nats, log p(z)
    latent: Latent
    params: Tensor  # [S*B, P*C, H, W], the decoder's output
    x: Tensor  # [S*B, C, H, W], what it is to explain

    @property
    def nats(self) -> Tensor:
        """[S*B], the evidence lower bound of log p(x) with this draw of z."""
        return self.log_likelihood - self.log_posterior + self.log_prior


class Objective(NamedTuple):
    """What training descends: the -ELBO as published recipes weigh it. Evaluation knows nothing of this.

    reduction `mean` divides the nats of an image by its dimensions, so that with the mse likelihood the loss is
    Sonnet's MSE / variance; `sum` keeps whole nats. kl_weight multiplies the rate log q(z|x) - log p(z), whose mean
    over the batch has no gradient below free_bits bits per image (1606.04934, appendix C.8, with all of z one group).

    The probabilistic VQ-VAEs add: entropy_scale multiplies log q alone; without sum_over_latents the rate is the mean
    over code positions (Roy et al.); stop_gradient_for_prior keeps the prior from pulling the encoder; flows of the
    bottleneck train from iaf_startup_steps on, and then stop_training_encoder_after_startup freezes the encoder.
    """

    reduction: str = "mean"
    kl_weight: Schedule = Schedule.parse("--kl-weight", "1")
    free_bits: float = 0.0
    total_steps: int = 1  # the length of the run, where a schedule ends
    entropy_scale: float = 1.0
    sum_over_latents: bool = True
    stop_gradient_for_prior: bool = False
    iaf_startup_steps: int = 0
    stop_training_encoder_after_startup: bool = False

    def __call__(self, elbo: Elbo, floor: float, dimensions: int, positions: int, step: int) -> Tensor:
        nats = -elbo.log_likelihood.mean() - floor
        rate = (self.entropy_scale * elbo.log_posterior - elbo.log_prior).mean()
        rate = rate if self.sum_over_latents else rate / positions
        if rate.requires_grad:  # a fixed prior over a deterministic code costs a constant: nothing to descend
            rate = rate.clamp(min=self.free_bits * math.log(2)) if self.free_bits else rate
            nats = nats + self.kl_weight(step, self.total_steps) * rate
        return nats / (dimensions if self.reduction == "mean" else 1) + elbo.latent.loss


class Autoencoder(nn.Module):
    """An encoder, a bottleneck, a decoder, a likelihood and a prior over the latent."""

    monitor = "neg_elbo"
    headline = {
        "mse": "MSE {:.5f}",
        "nmse": "(/variance {:.4f})",
        "psnr": "PSNR {:.2f} dB",
        "neg_elbo": "-ELBO {:,.2f} nats",
        "bits_per_dim": "{:.3f} bits/dim",
        "commitment": "commitment {:.4f}",
        "perplexity": "perplexity {:.0f}",
        "active_codes": "active {}",
        "active_units": "active units {}",
    }

    def __init__(
        self,
        *,
        encoder: nn.Module,
        bottleneck: nn.Module,
        decoder: nn.Module,
        likelihood: nn.Module,
        prior: nn.Module,
        image_shape: tuple[int, int, int],
        data_variance: float,
        objective: Objective,
    ):
        super().__init__()
        self.encoder, self.bottleneck, self.decoder = encoder, bottleneck, decoder
        self.likelihood, self.prior = likelihood, prior
        self.image_shape, self.data_variance, self.objective = tuple(image_shape), data_variance, objective
        self.dimensions = math.prod(image_shape)

    # training

    def forward(self, images: Tensor, labels: Tensor | None, step: int) -> Step:
        """One training step's loss and monitors for a batch of images `[B, C, H, W]` (uint8, or float points)."""
        x = unit_range(images)
        self._freeze(step)
        elbo = self.elbo(x, labels, step)
        positions = math.prod(self.bottleneck.grid)
        loss = self.objective(elbo, self.likelihood.floor, self.dimensions, positions, step)
        with torch.no_grad():
            metrics = {
                "loss": loss.detach(),
                # with the mse likelihood's own variance this is Sonnet's printed MSE / variance
                "reconstruction": (-elbo.log_likelihood.mean() - self.likelihood.floor) / self.dimensions,
                "mse": (self.likelihood.mean(elbo.params) - elbo.x).square().mean(),
                "neg_elbo": -elbo.nats.mean(),
                "reconstruction_nats": -elbo.log_likelihood.mean(),
                "rate": (elbo.log_posterior - elbo.log_prior).mean(),
                **elbo.latent.stats,
            }
            if elbo.latent.codes is not None:
                usage = self.bottleneck.usage(elbo.latent.codes)
                metrics["batch_perplexity"] = perplexity(usage)
                metrics["usage"] = usage
        return Step(loss, {name: value.detach() for name, value in metrics.items()})

    def summary(self, means: dict[str, Tensor]) -> dict[str, float]:
        """Monitors averaged over steps, as plain numbers to print; the usage vector becomes perplexity and count."""
        means = dict(means)
        usage = means.pop("usage", None)
        numbers = {name: float(value) for name, value in means.items()}
        numbers["nmse"] = numbers["mse"] / self.data_variance
        if usage is not None:
            numbers["perplexity"] = float(perplexity(usage))
            numbers["active_codes"] = int((usage > 0).sum())
        return numbers

    @torch.no_grad()
    def initialise(self, batches: Callable[[int], Tensor]) -> None:
        """Let the bottleneck fit its first codebook; `batches(n)` gives n training images."""
        if hasattr(self.bottleneck, "initialise"):
            h, w = self.bottleneck.grid
            features = [self.features(unit_range(tile)) for tile in batches(-(-20_000 // (h * w))).split(128)]
            self.bottleneck.initialise(torch.cat(features))

    def elbo(self, x: Tensor, labels: Tensor | None = None, step: int = 0) -> Elbo:
        """The bound's terms for x in [0, 1], `[B, C, H, W]`, with a draw of z from the posterior."""
        return self.elbo_of(self.features(x), x, labels, step)

    def elbo_of(self, features: Tensor, x: Tensor, labels: Tensor | None = None, step: int = 0) -> Elbo:
        """The same of images whose features are known, for one draw after another."""
        with _full_precision(x):  # distances and latent losses overflow or lose codes in half precision
            latent = self.bottleneck(features.float(), step)
        samples = len(latent.z) // len(x)
        if samples > 1:
            x = x.repeat(samples, 1, 1, 1)
            labels = None if labels is None else labels.repeat(samples)
        params = self.decoder(latent.z)
        with _full_precision(x):
            params = params.float()
            known = latent.detached() if self.objective.stop_gradient_for_prior else latent
            log_prior = self.prior.log_prob(known, labels)
            return Elbo(self.likelihood.log_prob(params, x), latent.log_q, log_prior, latent, params, x)

    def _freeze(self, step: int) -> None:
        """Let the parameters of this step's stage train, as a function of the step alone."""
        if self.objective.iaf_startup_steps:
            started = step >= self.objective.iaf_startup_steps
            self.bottleneck.flows.requires_grad_(started)
            encoder_trains = not (started and self.objective.stop_training_encoder_after_startup)
            self.encoder.requires_grad_(encoder_trains)
            self.bottleneck.projection.requires_grad_(encoder_trains)

    def features(self, x: Tensor) -> Tensor:
        inputs = self.likelihood.network_input(x).contiguous(memory_format=torch.channels_last)
        return self.encoder(inputs)

    def mode(self, x: Tensor) -> Latent:
        """The likeliest latent of x in [0, 1], `[B, C, H, W]`, without noise: its likeliest codes, or its mean."""
        features = self.features(x)
        with _full_precision(x):
            return self.bottleneck.mode(features.float())

    # pictures in, codes and pictures out

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """The codes `[B, h, w]` (int64) of images `[B, C, H, W]`, uint8 or float in [0, 1]."""
        self._need_codes("encode")
        return self.mode(self._pixels(images)).codes

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """The pictures `[B, C, H, W]` (float in [0, 1]) of codes `[B, h, w]` (integers below num_codes)."""
        self._need_codes("decode")
        if not isinstance(codes, Tensor) or codes.is_floating_point() or codes.dtype == torch.bool:
            raise ValueError(f"codes must be a tensor of integers, not {_kind(codes)}")
        if codes.ndim != 3 or tuple(codes.shape[1:]) != tuple(self.bottleneck.grid):
            expected = ", ".join(map(str, self.bottleneck.grid))
            raise ValueError(f"codes must have shape [B, {expected}], not {list(codes.shape)}")
        looked_at = codes.numel() and not torch.compiler.is_exporting()  # a program being exported has no values yet
        if looked_at and not (int(codes.min()) >= 0 and int(codes.max()) < self.bottleneck.num_codes):
            raise ValueError(
                f"codes must be from 0 to {self.bottleneck.num_codes - 1}, not {int(codes.min())} to {int(codes.max())}"
            )
        return self.pictures(self.bottleneck.embed(codes.long().to(self.device)))

    @torch.no_grad()
    def reconstruct(self, images: Tensor) -> Tensor:
        """The pictures `[B, C, H, W]` (float in [0, 1]) that images become on their way through the bottleneck."""
        return self.pictures(self.mode(self._pixels(images)).z)

    @torch.no_grad()
    def posterior_mean(self, images: Tensor) -> Tensor:
        """The mean `[B, D, 1, 1]` of q(z|x) for images `[B, C, H, W]`, of a model whose latent is continuous."""
        if self.bottleneck.num_codes is not None:
            raise ValueError(
                "posterior_mean needs a continuous latent; this model's is discrete: encode gives its codes"
            )
        return self.mode(self._pixels(images)).z

    @torch.no_grad()
    def pictures(self, z: Tensor) -> Tensor:
        """The likelihood's mean pictures `[B, C, H, W]` of latents `[B, D, h, w]`."""
        return self.likelihood.mean(self.decoder(z).float())

    @torch.no_grad()
    def sample(self, n: int, **options) -> Tensor:
        """n pictures `[n, C, H, W]` decoded from draws of the prior; options are those of the prior's `sample`."""
        draws = self.prior.sample(n, **options)
        return self.pictures(draws if self.bottleneck.num_codes is None else self.bottleneck.embed(draws))

    @property
    def shows_pictures(self) -> bool:
        """False for points of the plane, which are `[2, 1, 1]`."""
        return self.image_shape[1:] != (1, 1)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def _need_codes(self, what: str) -> None:
        if self.bottleneck.num_codes is None:
            raise ValueError(f"{what} needs discrete codes; this model's latent is continuous")

    def _pixels(self, images: Tensor) -> Tensor:
        if not isinstance(images, Tensor) or (images.dtype != torch.uint8 and not images.is_floating_point()):
            raise ValueError(f"images must be a tensor of uint8, or of floats in [0, 1], not {_kind(images)}")
        if images.ndim != 4 or tuple(images.shape[1:]) != self.image_shape:
            expected = ", ".join(map(str, self.image_shape))
            raise ValueError(f"images must have shape [B, {expected}], not {list(images.shape)}")
        x = unit_range(images.to(self.device))
        may_stray = images.is_floating_point() and self.shows_pictures  # bytes lie in [0, 1] by construction
        if may_stray and x.numel() and not (x.min() >= 0 and x.max() <= 1):
            raise ValueError("images of floats must lie in [0, 1]; give uint8 for 0 to 255")
        return x


def unit_range(images: Tensor) -> Tensor:
    """uint8 pixels as floats in [0, 1]; floats as they are."""
    return images.float().div_(255) if images.dtype == torch.uint8 else images.float()


def _full_precision(x: Tensor):
    kind = x.device.type
    # where there is nothing to switch off, exported programs stay free of regions that other runtimes do not know
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else contextlib.nullcontext()


def _kind(value: object) -> str:
    return str(value.dtype) if isinstance(value, Tensor) else type(value).__name__


def build_autoencoder(
    choices: dict[str, Choice],
    *,
    image_shape: tuple[int, int, int],
    data_variance: float,
    num_classes: int = 0,
    objective: Objective | None = None,
) -> Autoencoder:
    """The model that a choice for each slot describes; `num_classes` > 0 conditions the prior on labels.

    Raises `UserError` where members do not fit each other or the images.
    """
    likelihood = build(
        SLOTS["likelihood"],
        choices["likelihood"],
        {"image_shape": image_shape, "data_variance": data_variance},
    )
    nets = build(SLOTS["nets"], choices["nets"], {"image_shape": image_shape})
    objective = objective or Objective()
    bottleneck = build(
        SLOTS["bottleneck"],
        choices["bottleneck"],
        {"channels": nets.channels, "grid": nets.grid, "total_steps": objective.total_steps},
    )
    if (objective.iaf_startup_steps or objective.stop_training_encoder_after_startup) and not len(
        getattr(bottleneck, "flows", ())
    ):
        raise UserError(
            f"--iaf-startup-steps: --bottleneck {choices['bottleneck'].name} has no flows; "
            "give it some, as in --bottleneck gumbel iaf_flows=1"
        )
    encoder = nets.encoder()
    decoder = nets.decoder(bottleneck.code_dim, image_shape[0] * likelihood.params_per_channel)
    # last, so that from one seed models that differ in their prior alone start from the same nets
    prior = build(SLOTS["prior"], choices["prior"], {**bottleneck.prior_context(), "num_classes": num_classes})
    if num_classes and "num_classes" not in signature(find(SLOTS["prior"], choices["prior"].name))[0]:
        raise UserError(f"--conditional: --prior {choices['prior'].name} cannot use labels")
    model = Autoencoder(
        encoder=encoder,
        bottleneck=bottleneck,
        decoder=decoder,
        likelihood=likelihood,
        prior=prior,
        image_shape=image_shape,
        data_variance=data_variance,
        objective=objective,
    )
    return model.to(memory_format=torch.channels_last)
