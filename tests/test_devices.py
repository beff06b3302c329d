"""The device that is chosen, and the memory that the process keeps."""

import ctypes
import platform
import subprocess
import sys

import pytest
import torch

from vqvae.devices import choose_compile, choose_device, choose_precision
from vqvae.errors import OptionError

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


def test_precision_and_compilation_are_chosen_by_device():
    cpu = torch.device("cpu")
    assert choose_precision("auto", cpu) == "fp32"
    assert choose_precision("bf16", cpu) == "bf16"
    assert not choose_compile(None, cpu, steps=10**6)
    assert choose_compile(True, cpu, steps=1)
