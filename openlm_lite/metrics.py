"""What is measured: names, units, and the formulas behind them."""

from __future__ import annotations

import torch

# Dense bf16 matrix throughput of one device, FLOP/s, from the makers' data sheets (no sparsity).
_PEAK_FLOPS = {
    "A100": 312e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
}


def peak_flops(device: torch.device) -> float | None:
    """bf16 FLOP/s of the device, or None where it is not known (every CPU)."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    matches = [key for key in _PEAK_FLOPS if key in name]
    return _PEAK_FLOPS[max(matches, key=len)] if matches else None


def throughput(
    tokens: int, seconds: float, world_size: int, flops_per_token: int, device: torch.device
) -> dict[str, float]:
    """`perf/…` of `tokens` (of all ranks) trained in `seconds`.

    MFU = tokens/s x FLOPs per token / (ranks x peak FLOP/s of a device): PaLM, appendix B.
    """
    rate = tokens / seconds
    found = {
        "perf/tokens_per_second": rate,
        "perf/tokens_per_second_per_gpu": rate / world_size,
    }
    peak = peak_flops(device)
    if peak is not None:
        found["perf/mfu"] = rate * flops_per_token / (world_size * peak)
    if device.type == "cuda":
        found["perf/peak_memory_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
    return found
