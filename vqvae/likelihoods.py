"""Likelihoods: log p(x|z) in nats per example, given the decoder's output.

Each defines the encoder's input, and the image that the decoder's output gives: the mean of the pixels, or their median
if its docstring says so. MSE, PSNR and plots use that image. contracts.py gives the interface and the layout of the
parameters.

B batch, C channels, H W pixels, P parameters per channel.
"""

import math
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from vqvae import shares
from vqvae.contracts import Likelihood
from vqvae.errors import OptionError
from vqvae.registry import Passes, Range, checked

TILE = 2**20  # logits at a time


def _is_variance(text: str) -> bool:
    try:
        return text == "learned" or float(text) == 0 or 1e-9 <= float(text) <= 1e9
    except ValueError:
        return False


class MSE(Likelihood):
    """Gaussian with one variance for all pixels: log N(x; mean, variance I), a density in nats on pixels in [0, 1].

    The default variance is half that of the training data. Then -log p per dimension is MSE / data variance plus a
    constant, which is Sonnet's objective.

    With variance=learned, a batch in training has its maximum-likelihood variance, the mean squared error of the batch
    (2102.08663, section 3; SQ-VAE, 2205.07547). The mean of -log p over the batch is then D/2 log SSE + constant, where
    D is the number of dimensions and SSE the squared error of an image, summed over its dimensions and averaged over
    the batch: the weight of the error rises as the error falls. Evaluation uses the running mean of training's
    variances, a fixed parameter like any other, so that -ELBO is a bound for images that were not fitted.
    """

    params_per_channel = 1
    running_variance: Tensor  # scalar, with variance=learned

    @checked
    def __init__(
        self,
        *,
        image_shape: tuple[int, int, int],
        data_variance: float,
        variance: Annotated[
            str,
            Passes(_is_variance, "0, or from 1e-9 to 1e9, or learned"),
            "variance of pixels in [0, 1]; 0 for half the training data's; learned: that of each batch's errors",
        ] = "0.0",
        pixels: Annotated[
            Literal["centered", "symmetric", "sigmoid"],
            "range of the nets' input and output: x - 0.5, 2x - 1, or x in and its logits out",
        ] = "centered",
    ):
        super().__init__()
        self.dimensions, self.logits = math.prod(image_shape), pixels == "sigmoid"
        self.scale = 2.0 if pixels == "symmetric" else 1.0  # of pixels around 0.5
        self.learned = variance == "learned"
        if self.learned:
            self.register_buffer("running_variance", torch.tensor(data_variance))
            self.log_normalizer = self.dimensions / 2 * math.log(2 * math.pi * math.e / self.dimensions)
        else:
            self.fixed_variance = float(variance) or data_variance / 2
            self.log_normalizer = self.dimensions / 2 * math.log(2 * math.pi * self.fixed_variance)

    def network_input(self, x: Tensor) -> Tensor:
        return x if self.logits else (x - 0.5).mul_(self.scale)

    def log_prob(self, params: Tensor, x: Tensor) -> Tensor:
        error = (self._mean(params) - x).square().flatten(1).sum(1)
        if not self.learned:
            return -error / (2 * self.fixed_variance) - self.log_normalizer
        variance = self._fit(error.detach()) if self.training else self.running_variance
        return -error / (2 * variance) - self.dimensions / 2 * (2 * math.pi * variance).log()

    def center(self, params: Tensor) -> Tensor:
        return self._mean(params).clamp(0, 1)

    def sample(self, params: Tensor) -> Tensor:
        mean = self._mean(params)
        variance = self.running_variance if self.learned else self.fixed_variance
        return mean + variance**0.5 * torch.randn_like(mean)

    def _mean(self, params: Tensor) -> Tensor:
        return params.sigmoid() if self.logits else params / self.scale + 0.5

    def _fit(self, error: Tensor) -> Tensor:
        """The variance of the whole batch, given the squared errors `[B]` of a share; updates the running mean.

        The variance has no gradient. At the maximum of the likelihood its gradient would be zero.
        """
        if sums := shares.collect(error.sum(), error.new_tensor(len(error))):
            found = (sums[0] / (sums[1] * self.dimensions)).clamp(min=1e-9)
            self.running_variance.lerp_(found.to(self.running_variance), 0.01)
        return (shares.mean_over(error.mean(), len(error)) / self.dimensions).clamp(min=1e-9)


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

    def center(self, params: Tensor) -> Tensor:
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

    The image shown is the median, to which mu maps, as published. The mean is up to 0.045 nearer to gray: it averages
    over a deviation of 1, which the data do not have; black pixels of MNIST would be gray.
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

    def center(self, params: Tensor) -> Tensor:
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

    def center(self, params: Tensor) -> Tensor:
        return params.sigmoid()

    def sample(self, params: Tensor) -> Tensor:
        return torch.bernoulli(params.sigmoid())

    def check(self, images: Tensor) -> None:
        """Raise `OptionError` unless all pixels `[N, C, H, W]` (uint8) are 0 or 255."""
        if ((images > 0) & (images < 255)).any():
            problem = (
                "needs black and white pixels, but the images have gray ones; use binary data such as mnist-binary"
            )
            raise OptionError("likelihood", "bernoulli", problem)


class LogitLaplace(Likelihood):
    """Logit-Laplace of DALL-E (2102.12092, eq. 3), a density in nats on pixels in [0, 1].

    f(y | mu, b) = exp(-|logit y - mu| / b) / (2 b y (1 - y)) for y = (1 - 2 eps) x + eps; log_prob adds the map's
    log(1 - 2 eps). The decoder gives mu and log b, which is clamped to [-7, 7].

    The image shown is the median, (sigmoid(mu) - eps) / (1 - 2 eps), as published. It is what mu is fitted to, since
    the likelihood's error is absolute; the mean has no closed form.
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

    def center(self, params: Tensor) -> Tensor:
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
    decoder gives the location minus 0.5, and the log scale plus 2. The log scale is clamped to [-7, 7].

    The image shown is the mean of the logistic clipped to [0, 1]: with location m and scale s, the integral over
    [0, 1] of P(X > t), s log((1 + e^(m/s)) / (1 + e^((m-1)/s))). The mean of the 256 levels is the midpoint sum of this
    integral and differs by at most 2e-4. Where the scale is large, the location is far from both.
    """

    discrete = True
    params_per_channel = 2

    def network_input(self, x: Tensor) -> Tensor:
        return x - 0.5

    def log_prob(self, params: Tensor, x: Tensor) -> Tensor:
        location, log_scale = self._location_and_log_scale(params)
        inverse = (-log_scale).exp()
        upper = (x + 0.5 / 255 - location) * inverse
        lower = (x - 0.5 / 255 - location) * inverse
        # log(sigmoid(upper) - sigmoid(lower)), without the difference of two numbers near 1
        between = F.logsigmoid(upper) + F.logsigmoid(-lower) + torch.log(-torch.expm1(-inverse / 255))
        log_p = torch.where(x < 0.5 / 255, F.logsigmoid(upper), between)
        log_p = torch.where(x > 254.5 / 255, F.logsigmoid(-lower), log_p)
        return log_p.flatten(1).sum(1)

    def center(self, params: Tensor) -> Tensor:
        location, log_scale = self._location_and_log_scale(params)
        inverse = (-log_scale).exp()
        # log(1 + e^x) is -logsigmoid(-x)
        return (F.logsigmoid((1 - location) * inverse) - F.logsigmoid(-location * inverse)) / inverse

    def sample(self, params: Tensor) -> Tensor:
        location, log_scale = self._location_and_log_scale(params)
        u = torch.rand_like(location).clamp(1e-6, 1 - 1e-6)
        return ((location + log_scale.exp() * u.logit()) * 255).round().clamp(0, 255) / 255

    def _location_and_log_scale(self, params: Tensor) -> tuple[Tensor, Tensor]:
        location, log_scale = params.chunk(2, dim=1)
        # output 0 gives a scale of e^-2, about the spread of pixels
        return location + 0.5, (log_scale - 2).clamp(-7, 7)


class LogSoftmaxAt(torch.autograd.Function):
    """`F.cross_entropy` without its copies of the logits, which are large; only their gradient is as large.

    The forward pass takes a few images at a time. Besides the logits, it saves nothing of their size.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, index: Tensor) -> Tensor:
        """log softmax(logits)[index] over axis 1, `[B, C, H, W]`, of logits `[B, P, C, H, W]` and an int64 index."""
        at = index.unsqueeze(1)
        log_p = torch.cat([logits[rows].log_softmax(1).gather(1, at[rows]) for rows in _tiles(logits)])
        ctx.save_for_backward(logits, at, log_p)
        return log_p.squeeze(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        logits, at, log_p = ctx.saved_tensors
        p = (logits - (logits.gather(1, at) - log_p)).exp_()
        return p.scatter_add_(1, at, -torch.ones_like(log_p)).mul_(-gradient.unsqueeze(1)), None


def _tiles(params: Tensor) -> list[slice]:
    """The examples of params `[B, ...]` in tiles of at most `TILE` numbers, or of one example."""
    if torch.compiler.is_exporting():  # a program for any number of images cannot loop over tiles
        return [slice(None)]
    size = max(1, TILE // max(1, params[:1].numel()))
    return [slice(start, start + size) for start in range(0, max(1, len(params)), size)]


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
        return LogSoftmaxAt.apply(self._logits(params), levels).flatten(1).sum(1)

    def center(self, params: Tensor) -> Tensor:
        levels = torch.arange(256, device=params.device, dtype=params.dtype) / 255
        logits = self._logits(params)
        return torch.cat([torch.einsum("bpchw,p->bchw", logits[rows].softmax(1), levels) for rows in _tiles(logits)])

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
