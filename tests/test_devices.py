"""The device that is chosen, its matrix products, and the memory that the process keeps."""

import contextlib
import ctypes
import platform
import subprocess
import sys

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from tests.helpers import choose, fitting, images, training
from vqvae import devices
from vqvae.bottlenecks import BOTTLENECKS
from vqvae.devices import attention, choose_compile, choose_device, choose_precision, linear
from vqvae.errors import OptionError
from vqvae.evaluation import evaluate
from vqvae.likelihoods import LIKELIHOODS
from vqvae.priors import PRIORS
from vqvae.training import Means

KEEP = """
import ctypes
from vqvae.devices import keep_memory

libc, SIZE = ctypes.CDLL(None), 48 << 20
FIELDS = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
Info = type("Info", (ctypes.Structure,), {"_fields_": [(name, ctypes.c_size_t) for name in FIELDS]})
libc.mallinfo2.restype = Info
libc.malloc.argtypes, libc.malloc.restype, libc.free.argtypes = [ctypes.c_size_t], ctypes.c_void_p, [ctypes.c_void_p]

def allocate_and_free():
    '''Bytes mapped for one block, and bytes of the heap that stay after it is freed.'''
    mapped = libc.mallinfo2().hblkhd
    block = libc.malloc(SIZE)
    mapped = libc.mallinfo2().hblkhd - mapped
    libc.free(block)
    return mapped, libc.mallinfo2().fordblks

mapped, _ = allocate_and_free()
keep_memory()
mapped_now, kept = allocate_and_free()
print(mapped >= SIZE, mapped_now, kept >= SIZE)
"""


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc" or not hasattr(ctypes.CDLL(None), "mallinfo2"),
    reason="keep_memory has no effect with other allocators, and older versions of glibc do not count",
)
def test_freed_memory_stays_in_the_process():
    out = subprocess.check_output([sys.executable, "-c", KEEP], text=True).split()
    if out[0] == "False":
        pytest.skip("another allocator is preloaded")
    assert out == ["True", "0", "True"]


def test_auto_is_the_first_available_device(monkeypatch):
    available = {"cuda": True, "mps": True}
    monkeypatch.setattr("torch.cuda.is_available", lambda: available["cuda"])
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: available["mps"])
    assert choose_device("auto") == torch.device("cuda")
    available["cuda"] = False
    assert choose_device("auto") == torch.device("mps")
    available["mps"] = False
    assert choose_device("auto") == torch.device("cpu")
    with pytest.raises(OptionError, match="device=cuda: not available on this machine; available: cpu"):
        choose_device("cuda")


@pytest.mark.parametrize("present", [True, False])
def test_bf16_that_a_cpu_emulates_is_warned_of(monkeypatch, present):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "avx512_bf16": present}, raising=False)
    slow = contextlib.nullcontext() if present else pytest.warns(UserWarning, match="bf16: this CPU .* use fp32")
    with slow:
        assert choose_precision("bf16", torch.device("cpu")) == "bf16"


def test_precision_and_compilation_are_chosen_by_device():
    cpu = torch.device("cpu")
    assert choose_precision("auto", cpu) == "fp32"
    assert not choose_compile(None, cpu, steps=10**6)
    assert choose_compile(True, cpu, steps=1)


class WithoutFloat64(TorchDispatchMode):
    """The device `meta` as one that has no float64, as MPS. All values that come from it are zeros."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        there = [value for value in tree_iter((args, kwargs)) if isinstance(value, Tensor) and value.is_meta]
        if there and str(function) == "aten._to_copy.default" and str(kwargs.get("device")) == "cpu":
            return torch.zeros(there[0].shape, dtype=kwargs.get("dtype") or there[0].dtype)
        if there and str(function) in ("aten._local_scalar_dense.default", "aten.equal.default"):
            return 0
        out = function(*args, **kwargs)
        for value in tree_iter(out):
            if isinstance(value, Tensor) and value.is_meta and value.dtype == torch.float64:
                raise TypeError(f"{function}: the MPS framework doesn't support float64")
        return out


MODELS = {
    **{name: fitting(name) for name in BOTTLENECKS},
    "simvq init=normal": {"bottleneck": choose("bottleneck", "simvq", init="normal")},
    **{name: {"prior": name} for name in PRIORS if name not in ("normal", "made-flow")},
    "made-flow": fitting("gaussian") | {"prior": "made-flow"},
    **{name: {"likelihood": name} for name in LIKELIHOODS},
}


@pytest.mark.parametrize("name", MODELS)
def test_a_device_without_float64_trains_evaluates_and_resumes(name, monkeypatch):
    monkeypatch.setattr(devices, "WITHOUT_FLOAT64", {"meta"})
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)  # has no answer for meta
    module, labels = training(**MODELS[name]).to("meta"), torch.zeros(6, dtype=torch.int64)
    batch = images(6).to("meta")
    with WithoutFloat64():
        module.initialize(lambda n: batch)
        loss, monitored = module(batch, labels.to("meta"), 0)
        loss.backward()
        on_a_cpu = Means()
        on_a_cpu.add({key: torch.zeros(value.shape) for key, value in monitored.items()})
        assert on_a_cpu.sums["loss"].dtype == torch.float64
        means = Means(on_a_cpu.state())
        means.add(monitored)
        module.summary(means.values())
        evaluate(module.model, images(6), labels, iw_samples=2)
    assert means.sums["loss"].dtype == torch.float32


def test_means_from_a_device_without_float64_go_on_in_float64_elsewhere():
    means = Means({"sums": {"loss": torch.tensor(1.0)}, "count": 1})
    means.add({"loss": torch.tensor(0.5)})
    assert means.sums["loss"].dtype == torch.float64
    assert float(means.values()["loss"]) == 0.75


@pytest.mark.parametrize("avx512", [False, True])
@pytest.mark.parametrize("shape", [(64, 49), (5, 49), (320,), (257,), (0, 49), (2, 1)])  # 257 vectors are no images
def test_a_linear_layer_is_the_same_with_every_library(shape, avx512, monkeypatch):
    monkeypatch.setattr(devices, "AVX512", avx512)
    x, weight, bias = torch.randn(*shape, 8), torch.randn(6, 8), torch.randn(6)
    inputs = [t.requires_grad_() for t in (x, weight, bias)]
    exact = [t.detach().double().requires_grad_() for t in inputs]
    y, expected = linear(*inputs), torch.nn.functional.linear(*exact)
    assert y.dtype == torch.float32
    assert y.shape == (*shape, 6)
    assert torch.allclose(y.double(), expected, atol=1e-5)
    gradient = torch.randn_like(y)
    y.backward(gradient)
    expected.backward(gradient.double())
    for found, wanted in zip(inputs, exact, strict=True):
        assert torch.allclose(found.grad.double(), wanted.grad, atol=1e-4)


@pytest.mark.parametrize("avx512", [False, True])
def test_a_linear_layer_takes_part_in_autocast(avx512, monkeypatch):
    monkeypatch.setattr(devices, "AVX512", avx512)
    inputs = torch.randn(64, 49, 8), torch.randn(6, 8), torch.randn(6)
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(*inputs).dtype == torch.bfloat16
    assert linear(*(t.double() for t in inputs)).dtype == torch.float64


@pytest.mark.parametrize("autocast", [False, True])
def test_attention_in_bf16_is_that_of_fp32_on_a_cpu(autocast):
    parts = [torch.randn(2, 4, 9, 8).bfloat16().requires_grad_() for _ in "qkv"]
    exact = [t.detach().double().requires_grad_() for t in parts]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = attention(*parts, is_causal=True)
    expected = attention(*exact, is_causal=True)
    assert (y.dtype, expected.dtype) == (torch.bfloat16, torch.float64)
    assert torch.allclose(y.double(), expected, rtol=0.01, atol=1e-4)  # rounded once
    y.sum().backward()
    expected.sum().backward()
    for found, wanted in zip(parts, exact, strict=True):
        assert torch.allclose(found.grad.double(), wanted.grad, rtol=0.01, atol=0.01)
