"""How much memory this process has used at most.

On the CPU the number is resident memory of this process: weights, gradients, optimizer, activations, and also the
Python interpreter, imported libraries, cached data and freed memory that the allocator has not yet given back; pages
of memory-mapped files count once they have been read. Memory of data-loader workers and anything swapped out is not
in it. On an accelerator it is the memory of live tensors on that device; the allocator's reserve, the driver's context
and memory on the host are not in it. Not for the memory of one layer or one line: that is a profiler's work.
"""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

import psutil
import torch

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # mallopt(3)
_KEPT_BYTES = 1 << 28


def peak_memory_bytes(device: torch.device | str = "cpu") -> int:
    """Most memory, in bytes, since the process (CPU) or the use of the accelerator began."""
    device = torch.device(device)
    if device.type == "cpu":
        return _peak_resident_bytes()
    return int(torch.accelerator.max_memory_allocated(device))


def current_memory_bytes(device: torch.device | str = "cpu") -> int:
    """Memory in use now, in bytes: resident (CPU), or live tensors (accelerator)."""
    device = torch.device(device)
    if device.type == "cpu":
        return int(psutil.Process().memory_info().rss)
    return int(torch.accelerator.memory_allocated(device))


def return_freed_memory(block_bytes: int = 1 << 16) -> bool:
    """Make this process give blocks of at least ``block_bytes`` back to the system as soon as they are freed.

    The C library of Linux (glibc) keeps freed blocks for later, and with batches of changing length it comes to hold
    several times what is in use; returning them costs about 5 % of a training step on a CPU. Smaller blocks are kept,
    and given back by ``training.reshape.release_memory``. Call it before much is allocated. Does nothing elsewhere, or
    where the user chose (``MALLOC_MMAP_THRESHOLD_``); says whether it did.
    """
    if sys.platform != "linux" or "MALLOC_MMAP_THRESHOLD_" in os.environ:
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    # Without the second, glibc would shrink and grow its heap by a few pages all the time.
    return bool(mallopt(_M_MMAP_THRESHOLD, block_bytes)) and bool(mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES))


def reset_peak(device: torch.device | str = "cpu") -> bool:
    """Start the peak of this process anew at what is in use now; says whether that was possible.

    On the CPU only Linux can do it (``/proc/self/clear_refs``).
    """
    device = torch.device(device)
    if device.type != "cpu":
        torch.accelerator.reset_peak_memory_stats(device)
        return True
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return _peak_resident_bytes() <= 1.05 * current_memory_bytes()  # some sandboxes take the write and do nothing


class PeakMemory:
    """Peak memory of a piece of work, without what was there before it.

    Create it after all imports and before the model is loaded: the resident size at that moment is taken off the
    peak. The peak is that of the whole process, so work done earlier in the same process can show. On an accelerator
    nothing is taken off, because live tensors are counted and imports leave none there.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.start_bytes = current_memory_bytes(self.device) if self.device.type == "cpu" else 0

    def above_start(self) -> int:
        """Peak minus the size at creation, in bytes; never below 0."""
        return max(0, peak_memory_bytes(self.device) - self.start_bytes)


def _peak_resident_bytes() -> int:
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    # VmHWM belongs to this program alone. ru_maxrss on Linux survives exec, so that a child started by a large
    # process would report its parent's peak.
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource  # exists on Unix only

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB
