"""Accelerators: waiting for one, what it is, and how fast its bytes come to the host."""

import shutil
import subprocess
import time
from typing import Any

import torch

_LINK_BYTES = 2**30
_ASKED = ("name", "driver_version", "pcie.link.gen.max", "pcie.link.width.max", "memory.total")


def synchronize(device: torch.device) -> None:
    """Wait until everything that was launched on it is done; on the CPU everything is."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def described() -> dict[str, Any]:
    """What a figure of a CUDA device cannot be read without; {} where there is none."""
    if not torch.cuda.is_available():
        return {}
    found: dict[str, Any] = {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", f"--query-gpu={','.join(_ASKED)}", "--format=csv,noheader"]
        done = subprocess.run(query, capture_output=True, text=True, check=False)
        found["nvidia_smi"] = done.stdout.strip()
    return found


def host_memory(size_bytes: int, device: torch.device) -> torch.Tensor:
    """Bytes that this device copies to fastest: page-locked, and touched."""
    return torch.zeros(size_bytes, dtype=torch.uint8, pin_memory=device.type == "cuda")


def link_gbps(device: torch.device) -> float:
    """The rate of one large copy from the device into page-locked memory, the best of five: the limit of every snapshot."""
    source = torch.ones(_LINK_BYTES, dtype=torch.uint8, device=device)
    target = host_memory(_LINK_BYTES, device)
    seconds = []
    for _ in range(5):
        synchronize(device)
        started = time.perf_counter()
        target.copy_(source, non_blocking=True)
        synchronize(device)
        seconds.append(time.perf_counter() - started)
    return _LINK_BYTES / min(seconds) / 1e9


@torch.no_grad()
def copy_s(tensors: list[torch.Tensor], host: torch.Tensor) -> float:
    """Seconds to copy all tensors, each by itself, behind one another into `host` (`host_memory`); the device was idle."""
    device = tensors[0].device
    at, targets = 0, []
    for tensor in tensors:
        targets.append(host[at : at + tensor.nbytes].view(tensor.dtype).view(tensor.shape))
        at += -(-tensor.nbytes // 64) * 64  # views need whole elements
    synchronize(device)
    started = time.perf_counter()
    torch._foreach_copy_(targets, tensors, non_blocking=True)
    synchronize(device)
    return time.perf_counter() - started
