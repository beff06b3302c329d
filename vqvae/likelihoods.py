"""Likelihoods: what the decoder's output says about pixels, as log p(x|z) in nats per example.

Each owns its pixel map: what the encoder reads, and how its parameters become a picture again. Parameters come as
`[B, P*C, H, W]`, parameter-major, for pictures x in [0, 1], `[B, C, H, W]`; losses keep the batch axis.

B batch, C channels, H W pixels, P parameters per channel.
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqvae.errors import UserError


class MSE(nn.Module):
    """Gaussian of fixed variance: log N(x; mean, variance I), a density in nats on pixels in [0, 1].

    With the default variance, half that of the training data, -log p per dimension is MSE / data variance and a
    constant: Sonnet's objective exactly.

    variance   in squared [0, 1] pixels; 0 for half the training data's variance.
    pixels     centred: nets see and predict x - 0.5; symmetric: 2x - 1.
    """

    discrete = False
    params_per_channel = 1

    def __init__(
        self,
        *,
        image_shape: tuple,
        data_variance: float,
        variance: float = 0.0,
        pixels: Literal["centred", "symmetric"] = "centred",
    ):
        super().__init__()
        if not (variance >= 0 and math.isfinite(variance)):
            raise UserError(f"--likelihood mse: variance={variance} must be a number from 0 up")
        self.variance = variance or data_variance / 2
        self.scale = {"centred": 1.0, "symmetric": 2.0}[pixels]
        self.floor = math.prod(image_shape) / 2 * math.log(2 * math.pi * self.variance)

    def network_input(self, x: Tensor) -> Tensor:
        return (x - 0.5).mul_(self.scale)

    def log_prob(self, params: Tensor, x: Tensor) -> Tensor:
        error = (params / self.scale + 0.5 - x).square().flatten(1).sum(1)
        return -error / (2 * self.variance) - self.floor

    def mean(self, params: Tensor) -> Tensor:
        return (params / self.scale + 0.5).clamp(0, 1)

    def sample(self, params: Tensor) -> Tensor:
        mean = params / self.scale + 0.5
        return mean + self.variance**0.5 * torch.randn_like(mean)


class Gaussian(nn.Module):
    """Diagonal Gaussian whose mean and log-std the decoder gives: log N(x; mu, diag sigma^2) on raw x.

    A density in nats on x, which is not clamped to [0, 1]: made for points of the plane (VAE-2D). log sigma is kept
    in [-7, 7], so that a pixel that never varies cannot make the density infinite.
    """

    discrete = False
    params_per_channel = 2
    floor = 0.0

    def __init__(self, *, image_shape: tuple, data_variance: float):
        super().__init__()
        self.clamps = tuple(image_shape[1:]) != (1, 1)

    def network_input(self, x: Tensor) -> Tensor:
        return x

    def log_prob(self, params: Tensor, x: Tensor) -> Tensor:
        mean, log_std = _split(params, 2)
        log_std = log_std.clamp(-7, 7)
        z = (x - mean) * (-log_std).exp()
        return (-0.5 * (z.square() + math.log(2 * math.pi)) - log_std).flatten(1).sum(1)

    def mean(self, params: Tensor) -> Tensor:
        mean = _split(params, 2)[0]
        return mean.clamp(0, 1) if self.clamps else mean

    def sample(self, params: Tensor) -> Tensor:
        mean, log_std = _split(params, 2)
        return mean + log_std.clamp(-7, 7).exp() * torch.randn_like(mean)


class LogitGaussian(nn.Module):
    """Unit-variance Gaussian on logit-transformed, dequantised pixels (github.com/henrhoi/vae-pytorch).

    With level v = 255 x, u ~ U[0, 1) and p = alpha/2 + (1 - alpha)(v + u)/256, y = logit p has density N(y; mu, I).
    log_prob adds log |dy/dv| = log((1 - alpha)/256) - log p - log(1 - p) per dimension, which makes its mean over u a
    lower bound of the log probability of the 8-bit pixels (1511.01844, section 3.1), and so of bits/dim.

    alpha   how far pixels are kept from 0 and 1, where logits are infinite.
    """

    discrete = True
    params_per_channel = 1
    floor = 0.0

    def __init__(self, *, image_shape: tuple, data_variance: float, alpha: float = 0.1):
        super().__init__()
        if not 0 < alpha < 1:
            raise UserError(f"--likelihood logit-gaussian: alpha={alpha} must be between 0 and 1")
        self.alpha = alpha

    def _logit(self, x: Tensor, u: Tensor | float) -> tuple[Tensor, Tensor]:
        """y and log |dy/dv| of pixels x in [0, 1] with noise u."""
        p = self.alpha / 2 + (1 - self.alpha) * (x * 255 + u) / 256
        log_jacobian = math.log((1 - self.alpha) / 256) - p.log() - (1 - p).log()
        return p.logit(), log_jacobian

    def network_input(self, x: Tensor) -> Tensor:
        return self._logit(x, 0.5)[0]

    def log_prob(self, params: Tensor, x: Tensor) -> Tensor:
        y, log_jacobian = self._logit(x, torch.rand_like(x))
        return (-0.5 * ((y - params).square() + math.log(2 * math.pi)) + log_jacobian).flatten(1).sum(1)

    def mean(self, params: Tensor) -> Tensor:
        v = 256 * (params.sigmoid() - self.alpha / 2) / (1 - self.alpha)
        return ((v - 0.5) / 255).clamp(0, 1)  # the middle of the level's interval

    def sample(self, params: Tensor) -> Tensor:
        v = 256 * ((params + torch.randn_like(params)).sigmoid() - self.alpha / 2) / (1 - self.alpha)
        return v.floor().clamp(0, 255) / 255


class Bernoulli(nn.Module):
    """Bernoulli on binary pixels, the decoder's output its logits; nats, for x of 0 and 1 alone.

    Pixels in between are refused: there it is no likelihood. Binarise with --dataset mnist-binary.
    """

    discrete = True
    params_per_channel = 1
    floor = 0.0

    def __init__(self, *, image_shape: tuple, data_variance: float):
        super().__init__()

    def network_input(self, x: Tensor) -> Tensor:
        return 2 * x - 1

    def log_prob(self, params: Tensor, x: Tensor) -> Tensor:
        return -F.binary_cross_entropy_with_logits(params, x, reduction="none").flatten(1).sum(1)

    def check(self, images: Tensor) -> None:
        """Raise `UserError` unless all pixels (uint8) are 0 or 255."""
        if ((images > 0) & (images < 255)).any():
            raise UserError("--likelihood bernoulli: pixels must be black or white; --dataset mnist-binary has such")

    def mean(self, params: Tensor) -> Tensor:
        return params.sigmoid()

    def sample(self, params: Tensor) -> Tensor:
        return torch.bernoulli(params.sigmoid())


class LogitLaplace(nn.Module):
    """Logit-Laplace of DALL-E (2102.12092, eq. 3), a density in nats on pixels in [0, 1].

    f(y | mu, b) = exp(-|logit y - mu| / b) / (2 b y (1 - y)) for y = (1 - 2 eps) x + eps; log_prob adds the map's
    log(1 - 2 eps). The decoder gives mu and log b, kept in [-7, 7]; the picture is (sigmoid(mu) - eps) / (1 - 2 eps).

    eps   how far pixels are kept from 0 and 1.
    """

    discrete = False
    params_per_channel = 2
    floor = 0.0

    def __init__(self, *, image_shape: tuple, data_variance: float, eps: float = 0.1):
        super().__init__()
        if not 0 < eps < 0.5:
            raise UserError(f"--likelihood logit-laplace: eps={eps} must be between 0 and 0.5")
        self.eps = eps

    def network_input(self, x: Tensor) -> Tensor:
        return (1 - 2 * self.eps) * x + self.eps

    def log_prob(self, params: Tensor, x: Tensor) -> Tensor:
        mean, log_b = _split(params, 2)
        log_b = log_b.clamp(-7, 7)
        y = self.network_input(x)
        log_f = -(y.logit() - mean).abs() * (-log_b).exp() - math.log(2) - log_b - y.log() - (1 - y).log()
        return (log_f + math.log(1 - 2 * self.eps)).flatten(1).sum(1)

    def _picture(self, logit: Tensor) -> Tensor:
        return ((logit.sigmoid() - self.eps) / (1 - 2 * self.eps)).clamp(0, 1)

    def mean(self, params: Tensor) -> Tensor:
        return self._picture(_split(params, 2)[0])

    def sample(self, params: Tensor) -> Tensor:
        mean, log_b = _split(params, 2)
        u = torch.rand_like(mean) - 0.5
        return self._picture(mean - log_b.clamp(-7, 7).exp() * u.sign() * torch.log1p(-2 * u.abs()))


class DiscretisedLogistic(nn.Module):
    """Logistic integrated over each of the 256 levels (1701.05517, eq. 2, with one component): nats, bits/dim.

    Levels are 1/255 apart in [0, 1]; the outermost bins reach to infinity, so the 256 probabilities sum to one. The
    decoder gives the mean (on x - 0.5) and the log-scale plus 2; the log-scale is kept in [-7, 7].
    """

    discrete = True
    params_per_channel = 2
    floor = 0.0

    def __init__(self, *, image_shape: tuple, data_variance: float):
        super().__init__()

    def network_input(self, x: Tensor) -> Tensor:
        return x - 0.5

    def log_prob(self, params: Tensor, x: Tensor) -> Tensor:
        mean, log_scale = self._logistic(params)
        inverse = (-log_scale).exp()
        upper = (x + 0.5 / 255 - mean) * inverse
        lower = (x - 0.5 / 255 - mean) * inverse
        # log(sigmoid(upper) - sigmoid(lower)), without the difference of two numbers near 1
        between = F.logsigmoid(upper) + F.logsigmoid(-lower) + torch.log(-torch.expm1(-inverse / 255))
        log_p = torch.where(x < 0.5 / 255, F.logsigmoid(upper), between)
        log_p = torch.where(x > 254.5 / 255, F.logsigmoid(-lower), log_p)
        return log_p.flatten(1).sum(1)

    def _logistic(self, params: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_scale = _split(params, 2)
        return mean + 0.5, (log_scale - 2).clamp(-7, 7)  # at first a scale of e^-2: about the spread of pixels

    def mean(self, params: Tensor) -> Tensor:
        return self._logistic(params)[0].clamp(0, 1)

    def sample(self, params: Tensor) -> Tensor:
        mean, log_scale = self._logistic(params)
        u = torch.rand_like(mean).clamp(1e-6, 1 - 1e-6)
        return ((mean + log_scale.exp() * u.logit()) * 255).round().clamp(0, 255) / 255


class Softmax256(nn.Module):
    """One categorical over the 256 levels of each channel, as behind VQ-VAE's CIFAR-10 figure (1711.00937): nats.

    The picture shown is the expected level. 256 outputs per channel make the last layer dear.
    """

    discrete = True
    params_per_channel = 256
    floor = 0.0

    def __init__(self, *, image_shape: tuple, data_variance: float):
        super().__init__()
        self.register_buffer("levels", torch.arange(256.0) / 255, persistent=False)

    def network_input(self, x: Tensor) -> Tensor:
        return x - 0.5

    def log_prob(self, params: Tensor, x: Tensor) -> Tensor:
        logits = _view(params, 256)  # [B, 256, C, H, W]
        levels = (x * 255).round().long()
        return -F.cross_entropy(logits, levels, reduction="none").flatten(1).sum(1)

    def mean(self, params: Tensor) -> Tensor:
        return torch.einsum("bpchw,p->bchw", _view(params, 256).softmax(1), self.levels)

    def sample(self, params: Tensor) -> Tensor:
        p = _view(params, 256).softmax(1).movedim(1, -1)  # [B, C, H, W, 256]
        return torch.multinomial(p.flatten(0, -2), 1).view(p.shape[:-1]) / 255


def _view(params: Tensor, count: int) -> Tensor:
    """`[B, P*C, H, W]` as `[B, P, C, H, W]`."""
    return params.unflatten(1, (count, -1))


def _split(params: Tensor, count: int) -> tuple[Tensor, ...]:
    """The parameters, each `[B, C, H, W]`."""
    return params.chunk(count, dim=1)


LIKELIHOODS = {
    "mse": MSE,
    "gaussian": Gaussian,
    "logit-gaussian": LogitGaussian,
    "bernoulli": Bernoulli,
    "logit-laplace": LogitLaplace,
    "discretised-logistic": DiscretisedLogistic,
    "softmax256": Softmax256,
}
