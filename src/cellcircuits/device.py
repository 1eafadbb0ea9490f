"""Choose where to compute, and how much fits there.

Apple's MPS has no float64: tensors on the accelerator stay in the model's own precision, and float64
arithmetic happens in NumPy on the host.
"""

import os
from pathlib import Path

import torch

from cellcircuits.errors import UserError

CPU_BATCH_BYTES = 1 << 30
CONTAINER_LIMIT = Path("/sys/fs/cgroup/memory.max")


def choose_device(name: str) -> torch.device:
    """Turn `auto`, `cuda`, `mps` or `cpu` into a device that exists.

    Raises:
        UserError: the device asked for is not available.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return torch.device(next(kind for kind, exists in available.items() if exists))
    if not available.get(name, False):
        raise UserError(f"--device {name}: not available here; use --device auto or --device cpu.")
    return torch.device(name)


def batch_memory(device: torch.device) -> int:
    """Bytes that one batch of tail runs may take on `device`."""
    if device.type == "cuda":
        return int(0.5 * torch.cuda.mem_get_info(device)[0])
    if device.type == "mps":
        return int(0.3 * torch.mps.recommended_max_memory())
    return CPU_BATCH_BYTES


def host_memory() -> int:
    """Memory of the machine or, where that is less, of the container it gives us, in bytes."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        limit = int(CONTAINER_LIMIT.read_text())
    except (OSError, ValueError):  # no container, or one without a limit
        return physical
    return min(physical, limit)


def describe_device(device: torch.device) -> str:
    """A name for logs and records, such as `cuda (NVIDIA H200)` or `cpu (8 threads)`."""
    if device.type == "cuda":
        return f"cuda ({torch.cuda.get_device_name(device)})"
    if device.type == "cpu":
        return f"cpu ({torch.get_num_threads()} of {os.cpu_count()} threads)"
    return device.type
