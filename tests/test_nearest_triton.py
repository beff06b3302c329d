"""The kernel that searches for codes on GPUs, without one: in Triton's interpreter, and compiled for what is absent.

What it computes is held against brute force in float64 and against PyTorch's path; how fast, only a GPU can tell.
"""

import importlib.util
import multiprocessing
import sys
import warnings
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch

from vqvae.bottlenecks import nearest
from vqvae.bottlenecks.nearest import by_one_kernel, nearest_code

needs_triton = pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="Triton is not installed")


def interpreted(z: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    from vqvae.bottlenecks.nearest_triton import search

    return search(z, table, -table.square().sum(1) / 2)


@pytest.fixture(scope="module")
def search():
    """The kernel in Triton's interpreter: in a process of its own, since Triton must be told before it is imported."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TRITON_INTERPRET", "1")
            patch.setenv("CUDA_VISIBLE_DEVICES", "")
            pool.submit(interpreted, torch.zeros(1, 1), torch.zeros(1, 1)).result()
        yield lambda *tensors: pool.submit(interpreted, *tensors).result()


def check(codes: torch.Tensor, z: torch.Tensor, table: torch.Tensor) -> None:
    """No code may be farther than the nearest in float64, but by rounding."""
    distances = torch.cdist(z.double(), table.double(), compute_mode="donot_use_mm_for_euclid_dist").square()
    assert codes.dtype == torch.int64
    assert codes.shape == z.shape[:1]
    excess = distances.gather(1, codes[:, None]).squeeze(1) - distances.min(1).values
    assert (excess <= 1e-6 * distances.max()).all()
    assert (codes == distances.argmin(1)).float().mean() > 0.99
    assert (codes == nearest_code(z, table)).float().mean() > 0.99


@needs_triton
@pytest.mark.parametrize(
    ("n", "k", "d"),
    [
        (200, 130, 64),  # neither rows nor codes fill their last block
        (64, 64, 16),
        (1, 1, 1),
        (7, 3, 5),  # far fewer than a block
        (130, 65, 100),  # dimensions beyond the first 64, not all of a block
        (70, 200, 128),
    ],
)
def test_the_kernel_equals_brute_force(search, n, k, d):
    z, table = torch.randn(n, d), torch.randn(k, d)
    check(search(z, table), z, table)


@needs_triton
def test_no_vectors_have_no_codes(search):
    assert search(torch.empty(0, 4), torch.randn(9, 4)).shape == (0,)


@needs_triton
def test_of_equally_near_codes_the_first_is_taken(search):
    table = torch.randn(10, 3).repeat(15, 1)  # each code 15 times, within a block and in others
    codes = search(torch.randn(90, 3), table)
    assert (codes < 10).all()
    assert (search(torch.zeros(5, 3), torch.ones(70, 3)) == 0).all()


@needs_triton
def test_rows_and_codes_may_lie_anyhow_in_memory(search):
    z = torch.randn(4, 20, 6, 5).movedim(1, -1).reshape(-1, 20)[::2, 3:]
    table = torch.randn(40, 90).T[::3, ::2][:, :17]
    assert not z.is_contiguous()
    assert not table.is_contiguous()
    assert z.stride(1) == 1
    check(search(z, table), z, table)
    z = torch.randn(20, 77).T
    check(search(z, table[:, :17].repeat(1, 2)[:, :20]), z, table[:, :17].repeat(1, 2)[:, :20])


@needs_triton
def test_vectors_without_a_nearest_code_get_one_that_exists(search):
    z = torch.full((3, 5), torch.nan)
    z[1], z[2] = torch.inf, 1.0
    table = torch.randn(100, 5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        codes = search(z, table)
    assert ((codes >= 0) & (codes < 100)).all()
    assert codes[2] == nearest_code(z[2:], table)


@needs_triton
@pytest.mark.parametrize(("capability", "precision"), [(75, "ieee"), (80, "tf32x3"), (90, "tf32x3")])
def test_it_compiles_for_gpus_that_are_not_here(capability, precision, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from triton import compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from vqvae.bottlenecks.nearest_triton import nearest_kernel

    kernel = nearest_kernel.fn
    pointers = {"z": "*fp32", "codebook": "*fp32", "bias": "*fp32", "codes": "*i64"}
    constants = {"z_column": 1, "e_column": 1, "D": 64, "BLOCK_D": 64, "PRECISION": precision, "BLOCK_N": 64}
    constants |= {"BLOCK_K": 32}
    kinds = {name: "constexpr" if name in constants else pointers.get(name, "i32") for name in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kinds) if name not in constants}
    source = ASTSource(kernel, kinds, {(kernel.arg_names.index(n),): v for n, v in constants.items()}, aligned)
    made = compile(source, target=GPUTarget("cuda", capability, 32), options={"enable_fp_fusion": True})
    multiplies = {75: "fma.rn.f32", 80: "mma.sync", 90: "wgmma.mma_async"}[capability]
    assert multiplies in made.asm["ptx"]
    assert made.metadata.shared <= 64 << 10  # a T4 has as much


# without a GPU

ARGUMENTS = torch.randn(8, 4), torch.randn(5, 4), torch.randn(5)


@pytest.fixture
def untried(monkeypatch):
    monkeypatch.setattr(nearest, "FAILED", [])


def test_where_triton_fails_pytorch_searches_and_one_warning_says_so(untried, monkeypatch):
    monkeypatch.delitem(sys.modules, "vqvae.bottlenecks.nearest_triton", raising=False)
    monkeypatch.setitem(sys.modules, "triton", None)  # as if it were not installed
    with pytest.warns(UserWarning, match="Triton cannot search for codes here, PyTorch does"):
        assert by_one_kernel(*ARGUMENTS) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert by_one_kernel(*ARGUMENTS) is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@needs_triton
def test_a_kernel_that_cannot_start_is_no_end(untried):
    with pytest.warns(UserWarning, match="Triton cannot search"):
        assert by_one_kernel(*ARGUMENTS) is None


def test_other_precisions_are_pytorchs(untried):
    assert by_one_kernel(*(a.double() for a in ARGUMENTS)) is None
    assert nearest.FAILED == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@needs_triton
@pytest.mark.parametrize(("n", "k", "d"), [(5000, 1000, 64), (300, 70, 200), (77, 5, 3)])
def test_the_kernel_on_a_gpu(n, k, d):
    z, table = torch.randn(n, d), torch.randn(k, d)
    codes = nearest_code(z.cuda(), table.cuda())
    assert codes.is_cuda
    assert nearest.FAILED == []
    check(codes.cpu(), z, table)
