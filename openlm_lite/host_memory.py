"""How a process that trains on a CPU gets its memory from Linux.

A step allocates hundreds of megabytes anew, in tensors of some megabytes each. glibc takes these
from the system and gives them back one by one, and Linux has to clear each page again at its first
touch. What that costs is in docs/performance.md, and what it takes to keep the memory: holes that
freed tensors leave do not fit the next ones exactly, so that the process grows by some per cent.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping, MutableMapping

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def take_large_pages(environ: MutableMapping[str, str] = os.environ) -> None:
    """Let PyTorch ask Linux for pages of 2 MiB; before torch is imported.

    What the user has set stays.
    """
    environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def keep_freed_memory(environ: Mapping[str, str] = os.environ) -> bool:
    """Have glibc keep what is freed for the next tensor; from here on, for the whole process.

    Returns whether it does: not with another C library, and not where the environment says how
    memory is given back.
    """
    tunables = environ.get("GLIBC_TUNABLES", "")
    if any(name.startswith("MALLOC_") for name in environ):
        return False
    if any(f"glibc.malloc.{name}" in tunables for name in ("mmap", "trim_threshold", "top_pad")):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))
