"""What the CPU's memory costs a step."""

import subprocess
import sys

import pytest

# A step: 16 blocks of 4 MB, all freed at its end. Page faults of a later one, as glibc is, for a GPU, and for a CPU.
STEPS = """
import ctypes, resource
import torch
from dreambooth.devices import keep_freed_memory
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p

def step():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [libc.malloc(4 << 20) for _ in range(16)]
    for block in blocks:
        libc.memset(ctypes.c_void_p(block), 1, 4 << 20)
    for block in reversed(blocks):
        libc.free(ctypes.c_void_p(block))
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def later():
    return [step() for _ in range(4)][-1]

print(later())
keep_freed_memory(torch.device("cuda"))
print(later())
keep_freed_memory(torch.device("cpu"))
print(later())
"""


@pytest.mark.exhaustive
@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc is Linux's")
def test_a_step_on_the_cpu_finds_the_memory_of_the_one_before() -> None:
    done = subprocess.run([sys.executable, "-c", STEPS], capture_output=True, text=True, check=True, timeout=120)
    faults = [int(line) for line in done.stdout.split()]
    assert min(faults[:2]) > 5000
    assert faults[2] < 200
