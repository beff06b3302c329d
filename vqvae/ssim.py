"""Structural similarity of images. B batch, C channels, H W pixels."""

import torch
import torch.nn.functional as F
from torch import Tensor

RADIUS, SIGMA = 5, 1.5  # of the 11x11 Gaussian window, in pixels
C1, C2 = 0.01**2, 0.03**2  # K1 and K2 of the paper, for pixels in [0, 1]


def ssim(a: Tensor, b: Tensor) -> Tensor | None:
    """Mean structural similarity of images a and b in [0, 1], `[B, C, H, W]`, for each image, `[B]`; at most 1.

    Wang et al. 2004 (Image quality assessment: from error visibility to structural similarity), section III-B: 11x11
    Gaussian window of standard deviation 1.5, K1 = 0.01, K2 = 0.03, averaged over the positions at which the window
    lies inside the image, and over channels. scikit-image computes the same with gaussian_weights=True,
    use_sample_covariance=False and data_range=1. None for images smaller than the window.
    """
    height, width = a.shape[-2:]
    if min(height, width) <= 2 * RADIUS:
        return None
    rows, columns = (_filter(size).to(a) for size in (height, width))
    maps = torch.stack([a, b, a * a, b * b, a * b])
    # products with band matrices: on a CPU ten times as fast as a convolution of one channel, and on a GPU not in TF32
    mean_a, mean_b, aa, bb, ab = rows @ (maps @ columns.T)
    variances, covariance = aa - mean_a**2 + bb - mean_b**2, ab - mean_a * mean_b
    luminance = (2 * mean_a * mean_b + C1) / (mean_a**2 + mean_b**2 + C1)
    return (luminance * (2 * covariance + C2) / (variances + C2)).flatten(1).mean(1)


def _filter(size: int) -> Tensor:
    """The matrix `[size - 10, size]` whose rows are the window at every position along one axis."""
    offsets = torch.arange(-RADIUS, RADIUS + 1, dtype=torch.float64)
    window = torch.exp(-(offsets**2) / (2 * SIGMA**2))
    count = size - 2 * RADIUS
    return torch.stack([F.pad(window / window.sum(), (i, count - 1 - i)) for i in range(count)])
