"""Likelihoods: log p(x|z) in nats per example, given the decoder's output.

Each defines the encoder's input, and how the decoder's output becomes an image. contracts.py gives the interface and
the layout of the parameters.

B batch, C channels, H W pixels, P parameters per channel.
"""

import math
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from vqvae import shares
from vqvae.contracts import Likelihood
from vqvae.errors import OptionError
from vqvae.registry import Passes, Range, checked


class MSE(Likelihood):
    """Gaussian of fixed variance: log N(x; mean, variance I), a density in nats on pixels in [0, 1].

    The default variance is half that of the training data. Then -log p per dimension is MSE / data variance plus a
    constant, which is Sonnet's objective.
    """

    params_per_channel = 1

    @checked
    def __init__(
        self,
        *,
        image_shape: tuple[int, int, int],
        data_variance: float,
        variance: Annotated[
            float,
            Passes(lambda v: v == 0 or 1e-9 <= v <= 1e9, "0, or from 1e-9 to 1e9"),
            "variance of pixels in [0, 1]; 0 for half the training data's",
        ] = 0.0,
        pixels: Annotated[
            Literal["centered", "symmetric"], "range of the nets' input and output: x - 0.5, or 2x - 1"
        ] = "centered",
    ):
        super().__init__()
        self.variance = variance or data_variance / 2
        self.scale = {"centered": 1.0, "symmetric": 2.0}[pixels]
        self.log_normalizer = math.prod(image_shape) / 2 * math.log(2 * math.pi * self.variance)

    def network_input(self, x: Tensor) -> Tensor:
        return (x - 0.5).mul_(self.scale)

    def log_prob(self, params: Tensor, x: Tensor) -> Tensor:
        error = (params / self.scale + 0.5 - x).square().flatten(1).sum(1)
        return -error / (2 * self.variance) - self.log_normalizer

    def mean(self, params: Tensor) -> Tensor:
        return (params / self.scale + 0.5).clamp(0, 1)

    def sample(self, params: Tensor) -> Tensor:
        mean = params / self.scale + 0.5
        return mean + self.variance**0.5 * torch.randn_like(mean)


class Gaussian(Likelihood):
    """Diagonal Gaussian with mean and log standard deviation from the decoder: log N(x; mu, diag sigma^2).

    A density in nats on x, made for points of the plane (VAE-2D), which are not in [0, 1]. log sigma is clamped to
    [-7, 7], because the density of a pixel that never varies is unbounded.
    """

    takes_points = True
    params_per_channel = 2

    def __init__(self, *, image_shape: tuple[int, int, int]):
        super().__init__()
        self.clamps = tuple(image_shape[1:]) != (1, 1)  # images, not points

    def network_input(self, x: Tensor) -> Tensor:
        return x

    def log_prob(self, params: Tensor, x: Tensor) -> Tensor:
        mean, log_std = self._mean_and_log_std(params)
        z = (x - mean) * (-log_std).exp()
        return (-0.5 * (z.square() + math.log(2 * math.pi)) - log_std).flatten(1).sum(1)

    def mean(self, params: Tensor) -> Tensor:
        mean, _ = self._mean_and_log_std(params)
        return mean.clamp(0, 1) if self.clamps else mean

    def sample(self, params: Tensor) -> Tensor:
        mean, log_std = self._mean_and_log_std(params)
        return mean + log_std.exp() * torch.randn_like(mean)

    def _mean_and_log_std(self, params: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_std = params.chunk(2, dim=1)
        return mean, log_std.clamp(-7, 7)


class LogitGaussian(Likelihood):
    """Gaussian of unit variance on the logits of dequantized pixels (github.com/henrhoi/vae-pytorch).

    With level v = 255 x, u ~ U[0, 1) and p = alpha/2 + (1 - alpha)(v + u)/256, y = logit p has density N(y; mu, I).
    log_prob adds log |dy/dv| = log((1 - alpha)/256) - log p - log(1 - p) per dimension. Its mean over u is then a
    lower bound of the log probability of 8-bit pixels (1511.01844, section 3.1), so that bits/dim are defined.
    """

    discrete = True
    stochastic = True
    params_per_channel = 1

    @checked
    def __init__(self, *, alpha: Annotated[float, Range(1e-6, below=1), "twice the margin of p from 0 and 1"] = 0.1):
        super().__init__()
        self.alpha = alpha

    def network_input(self, x: Tensor) -> Tensor:
        return self._logit(x, 0.5)[0]

    def log_prob(self, params: Tensor, x: Tensor) -> Tensor:
        y, log_jacobian = self._logit(x, shares.draw(torch.rand, x.shape, device=x.device, dtype=x.dtype))
        return (-0.5 * ((y - params).square() + math.log(2 * math.pi)) + log_jacobian).flatten(1).sum(1)

    def mean(self, params: Tensor) -> Tensor:
        return ((self._level(params) - 0.5) / 255).clamp(0, 1)  # the middle of the level's interval

    def sample(self, params: Tensor) -> Tensor:
        return self._level(params + torch.randn_like(params)).floor().clamp(0, 255) / 255

    def _logit(self, x: Tensor, u: Tensor | float) -> tuple[Tensor, Tensor]:
        """y and log |dy/dv| of pixels x in [0, 1] with noise u."""
        p = self.alpha / 2 + (1 - self.alpha) * (x * 255 + u) / 256
        log_jacobian = math.log((1 - self.alpha) / 256) - p.log() - (1 - p).log()
        return p.logit(), log_jacobian

    def _level(self, y: Tensor) -> Tensor:
        """v + u of logits y."""
        return 256 * (y.sigmoid() - self.alpha / 2) / (1 - self.alpha)


class Bernoulli(Likelihood):
    """Bernoulli on binary pixels, which are 0 or 1. The decoder gives the logits; nats."""

    discrete = True
    params_per_channel = 1

    def network_input(self, x: Tensor) -> Tensor:
        return 2 * x - 1

    def log_prob(self, params: Tensor, x: Tensor) -> Tensor:
        return -F.binary_cross_entropy_with_logits(params, x, reduction="none").flatten(1).sum(1)

    def mean(self, params: Tensor) -> Tensor:
        return params.sigmoid()

    def sample(self, params: Tensor) -> Tensor:
        return torch.bernoulli(params.sigmoid())

    def check(self, images: Tensor) -> None:
        """Raise `OptionError` unless all pixels `[N, C, H, W]` (uint8) are 0 or 255."""
        if ((images > 0) & (images < 255)).any():
            problem = (
                "needs black and white pixels, but the images have gray ones; use binary data such as mnist-binary"
            )
            raise OptionError("", "likelihood", "bernoulli", problem)


class LogitLaplace(Likelihood):
    """Logit-Laplace of DALL-E (2102.12092, eq. 3), a density in nats on pixels in [0, 1].

    f(y | mu, b) = exp(-|logit y - mu| / b) / (2 b y (1 - y)) for y = (1 - 2 eps) x + eps; log_prob adds the map's
    log(1 - 2 eps). The decoder gives mu and log b, which is clamped to [-7, 7]. The image is
    (sigmoid(mu) - eps) / (1 - 2 eps).
    """

    params_per_channel = 2

    @checked
    def __init__(self, *, eps: Annotated[float, Range(1e-6, below=0.5), "margin of y from 0 and 1"] = 0.1):
        super().__init__()
        self.eps = eps

    def network_input(self, x: Tensor) -> Tensor:
        return (1 - 2 * self.eps) * x + self.eps

    def log_prob(self, params: Tensor, x: Tensor) -> Tensor:
        mean, log_b = params.chunk(2, dim=1)
        log_b = log_b.clamp(-7, 7)
        y = self.network_input(x)
        log_f = -(y.logit() - mean).abs() * (-log_b).exp() - math.log(2) - log_b - y.log() - (1 - y).log()
        return (log_f + math.log(1 - 2 * self.eps)).flatten(1).sum(1)

    def mean(self, params: Tensor) -> Tensor:
        return self._image(params.chunk(2, dim=1)[0])

    def sample(self, params: Tensor) -> Tensor:
        mean, log_b = params.chunk(2, dim=1)
        u = torch.rand_like(mean) - 0.5
        return self._image(mean - log_b.clamp(-7, 7).exp() * u.sign() * torch.log1p(-2 * u.abs()))

    def _image(self, logit: Tensor) -> Tensor:
        return ((logit.sigmoid() - self.eps) / (1 - 2 * self.eps)).clamp(0, 1)


class DiscretizedLogistic(Likelihood):
    """Logistic integrated over each of the 256 levels (1701.05517, eq. 2, with one component), in nats.

    Levels are 1/255 apart in [0, 1]. The outermost bins reach to infinity, so that the probabilities sum to one. The
    decoder gives the mean minus 0.5, and the log scale plus 2. The log scale is clamped to [-7, 7].
    """

    discrete = True
    params_per_channel = 2

    def network_input(self, x: Tensor) -> Tensor:
        return x - 0.5

    def log_prob(self, params: Tensor, x: Tensor) -> Tensor:
        mean, log_scale = self._mean_and_log_scale(params)
        inverse = (-log_scale).exp()
        upper = (x + 0.5 / 255 - mean) * inverse
        lower = (x - 0.5 / 255 - mean) * inverse
        # log(sigmoid(upper) - sigmoid(lower)), without the difference of two numbers near 1
        between = F.logsigmoid(upper) + F.logsigmoid(-lower) + torch.log(-torch.expm1(-inverse / 255))
        log_p = torch.where(x < 0.5 / 255, F.logsigmoid(upper), between)
        log_p = torch.where(x > 254.5 / 255, F.logsigmoid(-lower), log_p)
        return log_p.flatten(1).sum(1)

    def mean(self, params: Tensor) -> Tensor:
        return self._mean_and_log_scale(params)[0].clamp(0, 1)

    def sample(self, params: Tensor) -> Tensor:
        mean, log_scale = self._mean_and_log_scale(params)
        u = torch.rand_like(mean).clamp(1e-6, 1 - 1e-6)
        return ((mean + log_scale.exp() * u.logit()) * 255).round().clamp(0, 255) / 255

    def _mean_and_log_scale(self, params: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_scale = params.chunk(2, dim=1)
        # output 0 gives a scale of e^-2, about the spread of pixels
        return mean + 0.5, (log_scale - 2).clamp(-7, 7)


class Softmax256(Likelihood):
    """One categorical distribution over 256 levels per channel, as in VQ-VAE on CIFAR-10 (1711.00937), in nats.

    The image shown is the expected level. With 256 outputs per channel the decoder's last layer is expensive.
    """

    discrete = True
    params_per_channel = 256

    def network_input(self, x: Tensor) -> Tensor:
        return x - 0.5

    def log_prob(self, params: Tensor, x: Tensor) -> Tensor:
        levels = (x * 255).round().long()
        return -F.cross_entropy(self._logits(params), levels, reduction="none").flatten(1).sum(1)

    def mean(self, params: Tensor) -> Tensor:
        levels = torch.arange(256, device=params.device, dtype=params.dtype) / 255
        return torch.einsum("bpchw,p->bchw", self._logits(params).softmax(1), levels)

    def sample(self, params: Tensor) -> Tensor:
        p = self._logits(params).softmax(1).movedim(1, -1)  # [B, C, H, W, 256]
        return torch.multinomial(p.flatten(0, -2), 1).view(p.shape[:-1]) / 255

    def _logits(self, params: Tensor) -> Tensor:
        """`[B, 256, C, H, W]`."""
        return params.unflatten(1, (256, -1))


LIKELIHOODS = {
    "mse": MSE,
    "gaussian": Gaussian,
    "logit-gaussian": LogitGaussian,
    "bernoulli": Bernoulli,
    "logit-laplace": LogitLaplace,
    "discretized-logistic": DiscretizedLogistic,
    "softmax256": Softmax256,
}
