"""What every bottleneck with a codebook shares: the nearest code, the gradient past it, first values, usage.

N vectors, D code dimension, K codes.
"""

import math

import torch
from torch import Tensor

# Scores held at once while searching, so that a tile stays in a CPU's cache, or in a modest part of a GPU's memory.
TILE_SCORES = {"cpu": 1 << 17, "cuda": 1 << 26, "mps": 1 << 24}


@torch.no_grad()
def nearest_code(z: Tensor, codebook: Tensor) -> Tensor:
    """argmin_k ||z_n - e_k||^2 for z `[N, D]` and codebook `[K, D]`, as `[N]` int64.

    The N x K distances never exist at once. ||z||^2 is left out, being the same for every code, so what is
    compared is z.e - ||e||^2 / 2, in the precision of the inputs. Of equally near codes the first is taken.
    """
    bias = -codebook.square().sum(dim=1) / 2
    if torch.compiler.is_exporting():  # a program for any number of vectors cannot loop over tiles of them
        return torch.addmm(bias, z, codebook.T).argmax(dim=1)
    rows = max(1, TILE_SCORES.get(z.device.type, 1 << 24) // len(codebook))
    codes = [torch.addmm(bias, tile, codebook.T).argmax(dim=1) for tile in z.split(rows)]
    return torch.cat(codes)


def straight_through(z: Tensor, quantised: Tensor) -> Tensor:
    """The quantised value, with the gradient of the identity: dL/dz := dL/dquantised (1711.00937, section 3.2)."""
    return z + (quantised - z).detach()


def code_usage(codes: Tensor, num_codes: int) -> Tensor:
    """How often each code occurs among codes of any shape, `[K]` float32."""
    codes = codes.flatten()  # no bincount: on a GPU it waits for the device
    ones = torch.ones(len(codes), device=codes.device)
    return torch.zeros(num_codes, device=codes.device).index_add_(0, codes, ones)


def perplexity(usage: Tensor) -> Tensor:
    """exp(-sum p log p) of usage counts or shares `[K]`: how many codes, equally used, would be as varied."""
    share = usage.float() / usage.float().sum().clamp(min=1e-12)
    return torch.special.entr(share).sum().exp()


def first_codebook(init: str, num_codes: int, code_dim: int) -> Tensor:
    """A codebook `[K, D]` before any data: `uniform` in ±1/K, `fan-in` uniform in ±sqrt(3/D), else N(0, 1)."""
    limit = {"uniform": 1 / num_codes, "fan-in": math.sqrt(3 / code_dim)}.get(init)
    if limit is None:
        return torch.randn(num_codes, code_dim)
    return torch.empty(num_codes, code_dim).uniform_(-limit, limit)


def kmeans_codebook(vectors: Tensor, num_codes: int) -> Tensor:
    """K centres `[K, D]` of vectors `[N, D]` by k-means++ and ten Lloyd iterations (scikit-learn), seeded by torch.

    With fewer distinct vectors than codes, vectors are repeated with a jitter of 1% of their spread.
    """
    from sklearn.cluster import KMeans

    seed = int(torch.randint(2**31, ()))
    points = vectors.detach().float().cpu()
    if len(points) < num_codes:
        repeats = points[torch.randint(len(points), (num_codes - len(points),))]
        points = torch.cat([points, repeats + 0.01 * points.std() * torch.randn_like(repeats)])
    kmeans = KMeans(num_codes, init="k-means++", n_init=1, max_iter=10, random_state=seed, algorithm="lloyd")
    kmeans.fit(points.numpy())
    return torch.from_numpy(kmeans.cluster_centers_).to(vectors)
