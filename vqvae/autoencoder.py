"""Nets, bottleneck, likelihood and prior put together: the bound, codes and images.

    images -> encoder -> bottleneck -> decoder -> likelihood
                             prior on the latent

-ELBO = -log p(x|z) + log q(z|x) - log p(z), in nats per example, for every choice of members. Training may
minimize another loss (objectives.py), on which nothing here depends.

B batch, S samples, C channels, H W pixels, D code dimension, h w code grid.
"""

import contextlib
import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from vqvae.bottlenecks import BOTTLENECKS
from vqvae.contracts import Bottleneck, Discrete, Latent, Likelihood, Prior, check_codes, dtype_of, evaluating, kind_of
from vqvae.devices import full_precision
from vqvae.errors import OptionError
from vqvae.likelihoods import LIKELIHOODS
from vqvae.nets import NETS, POINT
from vqvae.priors import PRIORS
from vqvae.registry import Choice, Range, Slot, build, needs, whole_number_in

SLOTS = {
    "nets": Slot("nets", NETS),
    "bottleneck": Slot("bottleneck", BOTTLENECKS),
    "prior": Slot("prior", PRIORS),
    "likelihood": Slot("likelihood", LIKELIHOODS),
}
MOST_PIXELS = 2**20  # of one evaluation batch
MOST_PARAMETERS = 2**26  # of the likelihood's distributions: 256 MB
MOST_LOGITS = 2**27  # of the distributions over codes: 512 MB

Module = TypeVar("Module", bound=nn.Module)


class Elbo(NamedTuple):
    """The three terms of the bound for each example of a batch, and the values they come from.

    Bottlenecks that draw S samples in training repeat the batch, sample by sample.
    """

    log_likelihood: Tensor  # [S*B] nats, log p(x|z)
    log_posterior: Tensor  # [S*B] nats, log q(z|x)
    log_prior: Tensor  # [S*B] nats, log p(z)
    latent: Latent
    params: Tensor  # [S*B, P*C, H, W], the decoder's output
    x: Tensor  # [S*B, C, H, W], the images in [0, 1]

    @property
    def nats(self) -> Tensor:
        """[S*B], the evidence lower bound on log p(x) with this draw of z."""
        return self.log_likelihood - self.log_posterior + self.log_prior


class Autoencoder(nn.Module):
    """An encoder, a bottleneck, a decoder, a likelihood and a prior over the latent.

    The weights may be converted to double, and for evaluation to half or bfloat16: train in float32, with autocast. The
    bottleneck and the likelihood compute in float32 at least: distances and losses overflow or lose codes in half
    precision.
    """

    bottleneck: Bottleneck
    likelihood: Likelihood
    prior: Prior

    def __init__(
        self,
        *,
        encoder: nn.Module,
        bottleneck: Bottleneck,
        decoder: nn.Module,
        likelihood: Likelihood,
        prior: Prior,
        image_shape: tuple[int, int, int],
        data_variance: float,
        spatial: bool = True,
    ):
        super().__init__()
        self.encoder, self.bottleneck, self.decoder = encoder, bottleneck, decoder
        self.likelihood, self.prior = likelihood, prior
        self.image_shape, self.data_variance = tuple(image_shape), data_variance
        self.dimensions = math.prod(image_shape)
        self.spatial = spatial  # of contracts.Nets

    # the bound

    def elbo(self, x: Tensor, labels: Tensor | None = None, step: int = 0, **options: Any) -> Elbo:
        """The bound's terms for x in [0, 1], `[B, C, H, W]`, with a draw of z from the posterior.

        Raises ValueError for an empty batch, over which no loss has a mean, and for training in half precision.
        """
        if not len(x):
            raise ValueError("the bound needs at least one image, and the batch is empty")
        return self.elbo_of(self.features(x), x, labels, step, **options)

    def elbo_of(
        self,
        features: Tensor,
        x: Tensor,
        labels: Tensor | None = None,
        step: int = 0,
        *,
        for_prior: Callable[[Latent], Latent] = lambda latent: latent,
    ) -> Elbo:
        """Like `elbo`, but from the encoder's features, so that z can be drawn several times.

        An objective may pass `for_prior` to change the latent that the prior sees, for example to stop its gradient.
        """
        with full_precision(x):
            bottleneck = _wide(self.bottleneck)
            if self.training and bottleneck is not self.bottleneck:  # the copy would be trained
                raise ValueError("weights in half precision are for evaluation; train in float32, with autocast")
            latent = bottleneck(features.to(dtype_of(bottleneck)), step)
        z = latent.need_z()
        samples = len(z) // len(x)
        if samples > 1:
            x = x.repeat(samples, 1, 1, 1)
            labels = None if labels is None else labels.repeat(samples)
        params = self.decoder(z.to(dtype_of(self.decoder)))
        with full_precision(x):
            params = params.to(torch.promote_types(params.dtype, torch.float32))
            x = x.to(params)
            log_prior = self.prior.log_prob(for_prior(latent), labels)
            return Elbo(self.likelihood.log_prob(params, x), latent.log_q, log_prior, latent, params, x)

    def features(self, x: Tensor) -> Tensor:
        """The encoder's output `[B, channels, h, w]` for x in [0, 1], `[B, C, H, W]`."""
        inputs = self.likelihood.network_input(x).contiguous(memory_format=torch.channels_last)
        return self.encoder(inputs.to(dtype_of(self.encoder)))

    def quantize(self, x: Tensor) -> Latent:
        """The most likely latent of x in [0, 1], `[B, C, H, W]`: its codes, or its posterior mean."""
        with self._unchanged():
            features = self.features(x)
            with full_precision(x):
                bottleneck = _wide(self.bottleneck)
                return bottleneck.quantize(features.to(dtype_of(bottleneck)))

    # images in, codes and images out

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """The codes `[B, h, w]` (int64) of images `[B, C, H, W]`, uint8 or float in [0, 1]."""
        self._need_codes("encode")
        return torch.cat([self.quantize(tile).need_codes() for tile in self._tiles(self._pixels(images))])

    @torch.no_grad()
    def decode(self, codes: Tensor, *, levels: int | None = None) -> Tensor:
        """The images `[B, C, H, W]` (float in [0, 1]) of codes `[B, h, w]` (any integer type, 0 to num_codes - 1).

        With `levels`, only that many of the first levels are decoded. Raises ValueError for codes or levels out of
        range, and for a model without codes.
        """
        bottleneck = self._need_codes("decode")
        codes = check_codes(codes, bottleneck.num_codes, bottleneck.grid).to(self.device)
        if levels is not None:
            levels = whole_number_in("levels", levels, Range(1, len(bottleneck.level_names)))
        return self.decode_latents(_wide(bottleneck).embed(codes, levels))

    @torch.no_grad()
    def reconstruct(self, images: Tensor) -> Tensor:
        """Images `[B, C, H, W]`, encoded and decoded again (float in [0, 1])."""
        tiles = self._tiles(self._pixels(images))
        return torch.cat([self.decode_latents(self.quantize(tile).need_z()) for tile in tiles])

    @torch.no_grad()
    def posterior_mean(self, images: Tensor) -> Tensor:
        """The mean `[B, D, 1, 1]` of q(z|x) for images `[B, C, H, W]`, for models with a continuous latent."""
        if self.discrete is not None:
            raise ValueError("posterior_mean needs a continuous latent; this model has codes, which encode gives")
        return torch.cat([self.quantize(tile).need_z() for tile in self._tiles(self._pixels(images))])

    @torch.no_grad()
    def decode_latents(self, z: Tensor) -> Tensor:
        """The likelihood's images `[B, C, H, W]` for latents `[B, D, h, w]`."""
        with self._unchanged():
            params = (self.decoder(tile.to(dtype_of(self.decoder))).float() for tile in self._tiles(z))
            return torch.cat([self.likelihood.center(p) for p in params])

    @torch.no_grad()
    def sample(self, n: int, **options: Any) -> Tensor:
        """n images `[n, C, H, W]` decoded from draws of the prior; options are those of the prior's `sample`.

        `temperature` (at least 0) below 1 makes the draws likelier and less varied; at 0 they are the likeliest ones.
        `top_k`, `top_p`, `guidance` and `labels` are options of priors over codes, and `steps` and `choice_temperature`
        of the masked one. Raises ValueError for values out of range.
        """
        draws = self.prior.sample(n, **options)
        return self.decode_latents(draws if self.discrete is None else _wide(self.discrete).embed(draws))

    def _tiles(self, rows: Tensor) -> Sequence[Tensor]:
        """Rows `[B, ...]` in parts that are evaluated one after the other."""
        # an exported program for any number of images cannot loop over them
        return (rows,) if torch.compiler.is_exporting() else rows.split(self.at_once)

    # what it is

    @property
    def discrete(self) -> Discrete | None:
        """The bottleneck, if its latent consists of codes."""
        return self.bottleneck if isinstance(self.bottleneck, Discrete) else None

    @property
    def shows_images(self) -> bool:
        """False for points of the plane, which are `[2, 1, 1]`."""
        return self.image_shape[1:] != (1, 1)

    @property
    def at_once(self) -> int:
        """How many images are evaluated together: 256, or as many as bound the memory of features and parameters."""
        pixels = math.prod(self.image_shape[1:])
        parameters = self.dimensions * self.likelihood.params_per_channel
        return max(1, min(self.codes_at_once, MOST_PIXELS // pixels, MOST_PARAMETERS // parameters))

    @property
    def codes_at_once(self) -> int:
        """How many images' codes are evaluated together: 256, or as many as bound the memory of K logits per code."""
        has_logits = self.bottleneck.stochastic or self.prior.has_parameters
        if self.discrete is None or not has_logits:
            return 256
        return max(1, min(256, MOST_LOGITS // (self.discrete.tokens * self.discrete.num_codes)))

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def _unchanged(self) -> contextlib.AbstractContextManager[None]:
        """Evaluation mode within the block, so that batch norm keeps its statistics even during training."""
        return evaluating(self) if self.training else contextlib.nullcontext()

    def _need_codes(self, method: str) -> Discrete:
        if self.discrete is None:
            raise ValueError(f"{method} needs discrete codes; this model's latent is continuous")
        return self.discrete

    def _pixels(self, images: Tensor) -> Tensor:
        if not isinstance(images, Tensor) or (images.dtype != torch.uint8 and not images.is_floating_point()):
            raise ValueError(f"images must be a tensor of uint8, or of floats in [0, 1], not {kind_of(images)}")
        if images.ndim != 4 or tuple(images.shape[1:]) != self.image_shape:
            expected = ", ".join(map(str, self.image_shape))
            raise ValueError(f"images must have shape [B, {expected}], not {list(images.shape)}")
        x = unit_range(images.to(self.device))
        may_stray = images.is_floating_point() and self.shows_images  # uint8 lies in [0, 1] by construction
        if may_stray and x.numel() and not (x.min() >= 0 and x.max() <= 1):
            raise ValueError("images of floats must lie in [0, 1]; give uint8 for 0 to 255")
        return x


def unit_range(images: Tensor) -> Tensor:
    """uint8 pixels as floats in [0, 1]; floats unchanged, in float32 at least."""
    floats = images.to(torch.promote_types(images.dtype, torch.float32))
    return floats.div_(255) if images.dtype == torch.uint8 else floats


def _wide(module: Module) -> Module:
    """The module, or a copy in float32 if its weights are narrower."""
    return copy.deepcopy(module).float() if dtype_of(module).itemsize < 4 else module


def build_prior(choice: Choice, bottleneck: Bottleneck, num_classes: int = 0) -> Prior:
    """The prior of a choice, for the latents of a bottleneck; `num_classes` > 0 conditions it on labels.

    Raises `OptionError` for a prior that does not fit them.
    """
    of_codes = {"num_classes": num_classes, "scales": bottleneck.scales}
    prior: Prior = build(SLOTS["prior"], choice, {**bottleneck.prior_context(), **of_codes})
    if num_classes and not needs(SLOTS["prior"], choice.name, "num_classes"):
        raise OptionError("conditional", None, f"the prior {choice.name} cannot use labels; leave it out")
    return prior


def build_autoencoder(
    choices: Mapping[str, Choice],
    *,
    image_shape: tuple[int, int, int],
    data_variance: float,
    num_classes: int = 0,
    total_steps: int = 1,
) -> Autoencoder:
    """The model that a choice for each of SLOTS describes.

    `num_classes` > 0 conditions the prior on labels; `total_steps` is the length of the run that trains it. Raises
    `OptionError` where members do not fit each other or the images.
    """
    images = {"image_shape": image_shape, "data_variance": data_variance}
    likelihood = build(SLOTS["likelihood"], choices["likelihood"], images)
    if image_shape == POINT and not likelihood.takes_points:
        problem = "is a likelihood of pixels, and the data are points of the plane; use gaussian"
        raise OptionError("likelihood", choices["likelihood"].name, problem)
    if image_shape[1:] == (1, 1) and image_shape != POINT:
        raise OptionError("image_size", 1, "leaves one pixel of an image; try 4 or 8")
    nets = build(SLOTS["nets"], choices["nets"], {"image_shape": image_shape})
    features = {"channels": nets.channels, "grid": nets.grid, "total_steps": total_steps}
    bottleneck: Bottleneck = build(SLOTS["bottleneck"], choices["bottleneck"], features)
    encoder = nets.encoder()
    decoder = nets.decoder(bottleneck.code_dim, image_shape[0] * likelihood.params_per_channel)
    # last, so that models with one seed that differ only in their prior start from the same nets
    prior = build_prior(choices["prior"], bottleneck, num_classes)
    model = Autoencoder(
        encoder=encoder,
        bottleneck=bottleneck,
        decoder=decoder,
        likelihood=likelihood,
        prior=prior,
        image_shape=image_shape,
        data_variance=data_variance,
        spatial=nets.spatial,
    )
    return model.to(memory_format=torch.channels_last)
