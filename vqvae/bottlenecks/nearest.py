"""The search for the nearest code on each kind of device.

N vectors, D code dimension, K codes.
"""

import warnings

import torch
from torch import Tensor

from vqvae.devices import full_precision, linear

# Scores in memory at once: few enough for a CPU's cache, or for a modest part of a GPU's memory.
TILE_SCORES = {"cpu": 1 << 20, "cuda": 1 << 26, "mps": 1 << 24}
BLOCK, GROUP = 2048, 64  # CPU: codes per matrix product, and per maximum
FAILED: list[Exception] = []  # Triton's errors; after the first one this process uses PyTorch


@torch.no_grad()
def nearest_code(z: Tensor, codebook: Tensor) -> Tensor:
    """argmin_k ||z_n - e_k||^2 for z `[N, D]` and codebook `[K, D]`, as `[N]` int64.

    The N x K distances never exist at once. ||z||^2 is the same for every code, so the largest z.e - ||e||^2 / 2 wins,
    computed in the precision of the inputs. Both are first shifted by the codebook's mean: around a common offset, the
    differences of products would be lost in their rounding. Ties, up to rounding, may go to either code.
    """
    center = codebook.mean(dim=0)
    with full_precision(z):
        return _search(z - center, codebook - center)


def _search(z: Tensor, codebook: Tensor) -> Tensor:
    if z.device.type == "cpu" and not torch.compiler.is_exporting():
        return search_on_cpu(z, codebook)
    bias = -codebook.square().sum(dim=1) / 2
    if z.is_cuda and (found := search_with_triton(z, codebook, bias)) is not None:
        return found
    if torch.compiler.is_exporting():  # a program for any number of vectors cannot loop over tiles
        return torch.addmm(bias, z, codebook.T).argmax(dim=1)
    rows = max(1, TILE_SCORES.get(z.device.type, 1 << 24) // len(codebook))
    codes = [torch.addmm(bias, tile, codebook.T).argmax(dim=1) for tile in z.split(rows)]
    return torch.cat(codes)


def search_with_triton(z: Tensor, codebook: Tensor, bias: Tensor) -> Tensor | None:
    """argmax_k z_n.e_k + bias_k on a GPU, by a kernel that writes no scores to memory; None if PyTorch must search.

    PyTorch searches in compiled and exported programs, in precisions other than fp32, and where Triton fails.
    """
    if torch.compiler.is_compiling() or z.dtype != torch.float32 or FAILED:
        return None
    try:
        from vqvae.bottlenecks.nearest_triton import search

        return search(z, codebook, bias)
    except Exception as problem:  # an old GPU, no C compiler ...: PyTorch works in all these cases
        FAILED.append(problem)
        warnings.warn(f"Triton failed; PyTorch searches for codes instead, more slowly: {problem!r:.200}", stacklevel=2)
        return None


def search_on_cpu(z: Tensor, codebook: Tensor) -> Tensor:
    """Search on a CPU, one tile of vectors and one block of codes at a time, so that the scores stay in the cache.

    On a CPU, argmax over rows takes as long as the matrix product, and maxima take almost no time. So the maxima of
    groups of codes give the best group of a block, and only that group is searched.
    """
    last = len(codebook) - 1
    if missing := -len(codebook) % GROUP:  # copies of the last code complete the last group
        codebook = torch.cat([codebook, codebook[-1:].expand(missing, -1)])
    bias = -codebook.square().sum(dim=1) / 2
    rows = TILE_SCORES["cpu"] // min(BLOCK, len(codebook))
    codes = torch.zeros(len(z), dtype=torch.int64)
    for tile, code in zip(z.split(rows), codes.split(rows), strict=True):
        best, each = tile.new_full((len(tile),), -torch.inf), torch.arange(len(tile))
        for start in range(0, len(codebook), BLOCK):
            block = slice(start, start + BLOCK)
            scores = linear(tile, codebook[block], bias[block]).unflatten(1, (-1, GROUP))
            top, group = scores.amax(dim=2).max(dim=1)
            within = scores[each, group].argmax(dim=1)
            del scores  # the next ones take their memory; mapping new memory takes longer than filling it
            better = top > best
            best = torch.where(better, top, best)
            code.copy_(torch.where(better, start + group * GROUP + within, code))
    return codes.clamp_(max=last)
