"""What is measured: names, units, and the formulas behind them."""

from __future__ import annotations

import re
import resource
import sys

import torch

# Dense bf16 matrix throughput of one device, FLOP/s, from the makers' data sheets (no sparsity),
# by words of the device's name; of several that fit, the one with the most words.
_PEAK_FLOPS = {
    "A100": 312e12,
    "H100": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "GH200": 989e12,
    "H200": 989e12,
    "H200 NVL": 835e12,
    "B200": 2250e12,
    "GB200": 2500e12,
}


def peak_flops(device: torch.device) -> float | None:
    """bf16 FLOP/s of the device, or None where it is not known (every CPU)."""
    return peak_flops_of(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def peak_flops_of(name: str) -> float | None:
    """The same by the name that CUDA gives a device, such as NVIDIA H100 80GB HBM3."""
    words = set(re.split(r"[^A-Za-z0-9]+", name))  # an RTX A1000 is no A100
    matches = [known for known in _PEAK_FLOPS if set(known.split()) <= words]
    return _PEAK_FLOPS[max(matches, key=len)] if matches else None


def peak_memory_gib(device: torch.device) -> float:
    """What tensors took at most on a GPU so far; what this process took at most, for a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB; bytes on macOS
    return peak / (2**30 if sys.platform == "darwin" else 2**20)


def device_name(device: torch.device) -> str:
    """Such as `NVIDIA H200`, or `cpu`."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def throughput(
    tokens: int, seconds: float, world_size: int, flops_per_token: int, device: torch.device
) -> dict[str, float]:
    """`perf/…` of `tokens` (of all ranks) trained in `seconds`.

    MFU = tokens/s x FLOPs per token / (ranks x peak FLOP/s of a device): PaLM, appendix B. Where
    the peak is not known, there is no `perf/mfu`.
    """
    rate = tokens / seconds
    found = {
        "perf/tokens_per_second": rate,
        "perf/tokens_per_second_per_gpu": rate / world_size,
    }
    peak = peak_flops(device)
    if peak is not None:
        found["perf/mfu"] = rate * flops_per_token / (world_size * peak)
    found["perf/peak_memory_gib"] = peak_memory_gib(device)
    return found
