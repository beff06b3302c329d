"""The search for the nearest code, on each kind of device.

N vectors, D code dimension, K codes.
"""

import warnings

import torch
from torch import Tensor

# Scores held at once while searching: a tile stays in a CPU's cache, or in a modest part of a GPU's memory.
TILE_SCORES = {"cpu": 1 << 21, "cuda": 1 << 26, "mps": 1 << 24}
BLOCK, GROUP = 2048, 64  # on a CPU: codes of one product, which is read again at once, and of one maximum
FAILED: list[Exception] = []  # what Triton failed with, after which this process no longer asks it


@torch.no_grad()
def nearest_code(z: Tensor, codebook: Tensor) -> Tensor:
    """argmin_k ||z_n - e_k||^2 for z `[N, D]` and codebook `[K, D]`, as `[N]` int64.

    The N x K distances never exist at once. ||z||^2 is left out, being the same for every code, so what is
    compared is z.e - ||e||^2 / 2, in the precision of the inputs. Of equally near codes the first is taken.
    """
    if z.device.type == "cpu" and not torch.compiler.is_exporting():
        return in_cache(z, codebook)
    bias = -codebook.square().sum(dim=1) / 2
    if z.is_cuda and (found := by_one_kernel(z, codebook, bias)) is not None:
        return found
    if torch.compiler.is_exporting():  # a program for any number of vectors cannot loop over tiles of them
        return torch.addmm(bias, z, codebook.T).argmax(dim=1)
    rows = max(1, TILE_SCORES.get(z.device.type, 1 << 24) // len(codebook))
    codes = [torch.addmm(bias, tile, codebook.T).argmax(dim=1) for tile in z.split(rows)]
    return torch.cat(codes)


def by_one_kernel(z: Tensor, codebook: Tensor, bias: Tensor) -> Tensor | None:
    """argmax_k z_n.e_k + bias_k for vectors on a GPU, with no score in its memory; or None, where PyTorch is to do it.

    That is in compiled and exported programs, in other precisions than fp32, and where Triton is missing or fails.
    """
    if torch.compiler.is_compiling() or z.dtype != torch.float32 or FAILED:
        return None
    try:
        from vqvae.bottlenecks.nearest_triton import search

        return search(z, codebook, bias)
    except Exception as problem:  # an old GPU, no C compiler for Triton ...: whatever it is, PyTorch can search too
        FAILED.append(problem)
        warnings.warn(f"Triton cannot search for codes here, PyTorch does, more slowly: {problem!r:.200}", stacklevel=2)
        return None


def in_cache(z: Tensor, codebook: Tensor) -> Tensor:
    """The same on a CPU, where argmax over rows costs as much as the product, and maxima next to nothing.

    So the best group of codes is found from the groups' maxima, and the code within that group alone. One buffer
    holds the scores of every tile: fresh memory costs more to map than to fill.
    """
    last = len(codebook) - 1
    filling = codebook[-1:].expand(-len(codebook) % GROUP, -1)  # copies of the last code complete the last group
    codebook = torch.cat([codebook, filling])
    bias = -codebook.square().sum(dim=1) / 2
    rows = max(16, TILE_SCORES["cpu"] // len(codebook))
    buffer = z.new_empty(min(rows, len(z)), len(codebook))
    codes = []
    for tile in z.split(rows):
        scores, maxima = buffer[: len(tile)], []
        for block, e, b in zip(scores.split(BLOCK, dim=1), codebook.split(BLOCK), bias.split(BLOCK), strict=True):
            torch.addmm(b, tile, e.T, out=block)
            maxima.append(block.unflatten(1, (-1, GROUP)).amax(dim=2))
        group = torch.cat(maxima, dim=1).argmax(dim=1)
        within = scores.unflatten(1, (-1, GROUP))[torch.arange(len(tile)), group].argmax(dim=1)
        codes.append(group * GROUP + within)
    return torch.cat(codes).clamp_(max=last)
