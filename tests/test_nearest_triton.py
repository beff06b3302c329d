"""The GPU kernel that searches for codes, tested without a GPU: in Triton's interpreter, and compiled for GPUs.

Its codes are compared with the nearest in float64. Its speed needs a GPU (benchmarks/).
"""

import importlib.util
import multiprocessing
import sys
import warnings
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch

from tests.bottleneck_helpers import assert_nearest
from vqvae.bottlenecks import nearest
from vqvae.bottlenecks.nearest import nearest_code, search_with_triton

needs_triton = pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="Triton is not installed")


def interpreted(z: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    from vqvae.bottlenecks.nearest_triton import search

    return search(z, table, -table.square().sum(1) / 2)


@pytest.fixture(scope="module")
def search():
    """The kernel in Triton's interpreter. It runs in another process, because Triton reads the setting on import."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TRITON_INTERPRET", "1")
            patch.setenv("CUDA_VISIBLE_DEVICES", "")
            pool.submit(interpreted, torch.zeros(1, 1), torch.zeros(1, 1)).result()
        yield lambda *tensors: pool.submit(interpreted, *tensors).result()


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
def test_no_code_is_nearer_than_the_kernels(search, n, k, d):
    z, table = torch.randn(n, d), torch.randn(k, d)
    assert_nearest(search(z, table), z, table)


@needs_triton
def test_without_vectors_there_are_no_codes(search):
    assert search(torch.empty(0, 4), torch.randn(9, 4)).shape == (0,)


@needs_triton
def test_of_equally_near_codes_one_is_chosen(search):
    z, table = torch.randn(90, 3), torch.randn(10, 3).repeat(15, 1)  # each code 15 times, in one block and in others
    assert_nearest(search(z, table), z, table)
    codes = search(torch.zeros(5, 3), torch.ones(70, 3))
    assert ((codes >= 0) & (codes < 70)).all()


@needs_triton
def test_rows_and_codes_may_have_any_strides(search):
    z = torch.randn(4, 20, 6, 5).movedim(1, -1).reshape(-1, 20)[::2, 3:]
    table = torch.randn(40, 90).T[::3, ::2][:, :17]
    assert not z.is_contiguous()
    assert not table.is_contiguous()
    assert z.stride(1) == 1
    assert_nearest(search(z, table), z, table)
    z, table = torch.randn(20, 77).T, torch.randn(30, 40)[:, 1::2]
    assert_nearest(search(z, table), z, table)


@needs_triton
def test_the_code_found_exists_whatever_the_vectors_are(search):
    z = torch.full((3, 5), torch.nan)
    z[1], z[2] = torch.inf, 1.0
    table = torch.randn(100, 5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        codes = search(z, table)
    assert ((codes >= 0) & (codes < 100)).all()
    assert_nearest(codes[2:], z[2:], table)


@needs_triton
@pytest.mark.parametrize(("capability", "precision"), [(75, "ieee"), (80, "tf32x3"), (90, "tf32x3")])
def test_the_kernel_compiles_for_gpus(capability, precision, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from triton import compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from vqvae.bottlenecks.nearest_triton import nearest_kernel

    kernel = nearest_kernel.fn
    pointers = {"z": "*fp32", "codebook": "*fp32", "bias": "*fp32", "codes": "*i64"}
    constants = {"z_column": 1, "e_column": 1, "D": 64, "BLOCK_D": 64, "PRECISION": precision, "BLOCK_N": 64}
    constants |= {"BLOCK_K": 32}
    types = {name: "constexpr" if name in constants else pointers.get(name, "i32") for name in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(types) if name not in constants}
    source = ASTSource(kernel, types, {(kernel.arg_names.index(n),): v for n, v in constants.items()}, aligned)
    compiled = compile(source, target=GPUTarget("cuda", capability, 32), options={"enable_fp_fusion": True})
    multiplies = {75: "fma.rn.f32", 80: "mma.sync", 90: "wgmma.mma_async"}[capability]
    assert multiplies in compiled.asm["ptx"]
    assert compiled.metadata.shared <= 64 << 10  # bytes of shared memory; a T4 has as many


# without a GPU

ARGUMENTS = torch.randn(8, 4), torch.randn(5, 4), torch.randn(5)


@pytest.fixture
def no_failure_yet(monkeypatch):
    monkeypatch.setattr(nearest, "FAILED", [])


def test_if_triton_fails_pytorch_searches_and_warns_once(no_failure_yet, monkeypatch):
    monkeypatch.delitem(sys.modules, "vqvae.bottlenecks.nearest_triton", raising=False)
    monkeypatch.setitem(sys.modules, "triton", None)  # as if it were not installed
    with pytest.warns(UserWarning, match="Triton failed; PyTorch searches"):
        assert search_with_triton(*ARGUMENTS) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert search_with_triton(*ARGUMENTS) is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@needs_triton
def test_pytorch_searches_if_the_kernel_cannot_start(no_failure_yet):
    with pytest.warns(UserWarning, match="Triton failed"):
        assert search_with_triton(*ARGUMENTS) is None


def test_pytorch_searches_in_other_precisions(no_failure_yet):
    assert search_with_triton(*(a.double() for a in ARGUMENTS)) is None
    assert nearest.FAILED == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@needs_triton
@pytest.mark.parametrize(("n", "k", "d"), [(5000, 1000, 64), (300, 70, 200), (77, 5, 3)])
def test_the_kernel_on_a_gpu(n, k, d):
    z, table = torch.randn(n, d), torch.randn(k, d)
    codes = nearest_code(z.cuda(), table.cuda())
    assert codes.is_cuda
    assert nearest.FAILED == []
    assert_nearest(codes.cpu(), z, table)
