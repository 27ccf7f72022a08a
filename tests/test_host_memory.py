"""Memory of a run on a CPU: large pages are asked for, and what is freed is kept."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from openlm_lite.host_memory import keep_freed_memory, take_large_pages

FAULTS = """
import resource, sys
from openlm_lite.host_memory import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
import torch
def step():
    [torch.ones(48 * 2**20 // 4) for _ in range(2)]  # above any threshold of glibc's own
for _ in range(20):  # holes of freed tensors have to fit, which takes some turns
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def test_large_pages_are_asked_for_unless_the_user_has_said_something() -> None:
    environ: dict[str, str] = {}
    take_large_pages(environ)
    assert environ == {"THP_MEM_ALLOC_ENABLE": "1"}
    environ = {"THP_MEM_ALLOC_ENABLE": "0"}
    take_large_pages(environ)
    assert environ == {"THP_MEM_ALLOC_ENABLE": "0"}


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="not glibc")
@pytest.mark.slow
def test_memory_that_is_kept_costs_no_page_faults() -> None:
    def faults(how: str) -> int:
        environ = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "THP_"))}
        words = [sys.executable, "-c", FAULTS, how]
        done = subprocess.run(words, env=environ, capture_output=True, text=True, check=True)
        return int(done.stdout)

    pages = 5 * 2 * 48 * 2**20 // os.sysconf("SC_PAGE_SIZE")
    assert faults("leave") > 0.9 * pages
    assert faults("keep") < 0.01 * pages


@pytest.mark.parametrize(
    "environ", [{"MALLOC_TRIM_THRESHOLD_": "1"}, {"GLIBC_TUNABLES": "glibc.malloc.mmap_max=5"}]
)
def test_what_the_user_has_set_for_malloc_stays(environ: dict[str, str]) -> None:
    assert not keep_freed_memory(environ)
