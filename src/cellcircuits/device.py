"""Choose where to compute, and how much fits there.

Apple's MPS has no float64: tensors on the accelerator stay in the model's own precision, and float64
arithmetic happens in NumPy on the host.
"""

import mmap
import os
from pathlib import Path

import numpy as np
import torch

from cellcircuits.errors import UserError

# a larger batch is slower: memory beyond the allocator's reach is mapped and zeroed anew for every tensor
CPU_BATCH_BYTES = 1 << 28
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
        # what PyTorch keeps for its next tensors is not free to others, but it is to us
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(0.5 * (torch.cuda.mem_get_info(device)[0] + unused))
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


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether a computation needed more memory than the device has; MPS and CPU have no type of their own for it."""
    said = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in said or "can't allocate memory" in said


def kept_on_host(tensor: torch.Tensor) -> torch.Tensor:
    """Copy a tensor to the host for a long stay, into pages of its own.

    Long-lived tensors between the engine's short-lived ones would leave holes in the heap, several times their size.
    """
    on_host = tensor.cpu().contiguous().numpy()
    # the system joins private pages into one map: it allows only so many maps, and shared ones each stay one
    pages = mmap.mmap(-1, max(1, on_host.nbytes), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    copy = np.frombuffer(pages, on_host.dtype, on_host.size).reshape(on_host.shape)
    copy[...] = on_host
    return torch.from_numpy(copy)


def describe_device(device: torch.device) -> str:
    """A name for logs and records, such as `cuda (NVIDIA H200)` or `cpu (8 threads)`."""
    if device.type == "cuda":
        return f"cuda ({torch.cuda.get_device_name(device)})"
    if device.type == "cpu":
        return f"cpu ({torch.get_num_threads()} of {os.cpu_count()} threads)"
    return device.type
