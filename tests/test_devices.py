"""Memory that a process keeps."""

import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, torch
from vqvae.devices import keep_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    held = [torch.ones(12 << 20) for _ in range(3)]  # 48 MiB each
    del held
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

given_back = min(faults() for _ in range(3))
keep_memory()
print(given_back, min(faults() for _ in range(12)))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators are left alone")
def test_kept_memory_is_not_mapped_again():
    given_back, kept = map(int, subprocess.check_output([sys.executable, "-c", FAULTS]).split())
    assert kept < 100 < given_back
