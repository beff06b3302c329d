"""The search for the nearest code as one Triton kernel. Import it only where there is a GPU.

N vectors, K codes, D code dimension.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# (rows per block, codes per block, warps, pipeline stages). Triton times them once per K and D and takes the fastest.
SHAPES = ((64, 64, 4, 2), (64, 32, 4, 3), (128, 64, 8, 2), (128, 64, 8, 3), (128, 128, 8, 2))
CONFIGS = [
    triton.Config({"BLOCK_N": rows, "BLOCK_K": codes}, num_warps=warps, num_stages=stages)
    for rows, codes, warps, stages in SHAPES
]


@triton.autotune(CONFIGS if torch.cuda.is_available() else CONFIGS[:1], key=["K", "D"])  # an interpreter has no clock
@triton.jit
def nearest_kernel(
    z, codebook, bias, codes, N, K, z_row, z_column, e_row, e_column,
    D: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Compare BLOCK_N rows of z `[N, D]` with all codes, BLOCK_K at a time. Scores stay on the chip."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    lanes, d = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_D)
    z_tile = z + rows[:, None] * z_row + d[None, :] * z_column
    e_tile = codebook + lanes[None, :].to(tl.int64) * e_row + d[:, None] * e_column  # transposed
    inside = rows[:, None] < N
    first = tl.load(z_tile, inside & (d[None, :] < D), 0.0)  # loaded once; mostly all of D
    best = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    code = tl.zeros((BLOCK_N,), tl.int32)
    for start in range(0, K, BLOCK_K):
        there = start + lanes < K
        e = tl.load(e_tile, there[None, :] & (d[:, None] < D), 0.0)
        scores = tl.dot(first, e, input_precision=PRECISION)
        for done in range(BLOCK_D, D, BLOCK_D):
            within = done + d < D
            more = tl.load(z_tile + done * z_column, inside & within[None, :], 0.0)
            e = tl.load(e_tile + done * e_column, there[None, :] & within[:, None], 0.0)
            scores = tl.dot(more, e, scores, input_precision=PRECISION)
        scores += tl.load(bias + start + lanes, there, float("-inf"))[None, :]
        top = tl.max(scores, 1)
        which = tl.min(tl.where(scores == top[:, None], start + lanes[None, :], K), 1)
        better = top > best
        best = tl.where(better, top, best)
        code = tl.where(better, which, code)
        e_tile += BLOCK_K * e_row
    tl.store(codes + rows, code.to(tl.int64), rows < N)


def search(z: Tensor, codebook: Tensor, bias: Tensor) -> Tensor:
    """argmax_k z_n.e_k + bias_k for z `[N, D]`, codebook `[K, D]` and bias `[K]`, all fp32, as `[N]` int64.

    Tensor cores compute "3xTF32": every number is split into two TF32 numbers, and three of their four products are
    summed in fp32. The fourth is 2^-22 of the product, no more than the rounding of a sum of 64 terms in fp32. A single
    TF32 product is three times as fast, but gives one vector in a thousand another code (K = 16,384, D = 64, normal).
    """
    tensor_cores = z.is_cuda and torch.version.hip is None and torch.cuda.get_device_capability(z.device) >= (8, 0)
    (N, D), K = z.shape, len(codebook)
    codes = torch.empty(N, dtype=torch.int64, device=z.device)
    if N == 0:
        return codes
    with torch.cuda.device_of(z):
        nearest_kernel[lambda config: (triton.cdiv(N, config["BLOCK_N"]),)](
            z, codebook, bias, codes, N, K, *z.stride(), *codebook.stride(),
            D=D,
            BLOCK_D=min(64, max(16, triton.next_power_of_2(D))),
            PRECISION="tf32x3" if tensor_cores else "ieee",
            enable_fp_fusion=True,  # the default changes between versions of Triton
        )  # fmt: skip
    return codes
