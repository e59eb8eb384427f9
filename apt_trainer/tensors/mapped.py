"""Weights that lie in a mapping of their file, of which a process holds the pages that it has read."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

import torch

_MADV_PAGEOUT = 21  # madvise(2), of Linux


def let_go_of_pages(tensor: torch.Tensor) -> None:
    """Tell Linux that ``tensor`` is not going to be read soon: whole pages of it leave this process, and are read
    again if they are. A hint, which changes no value; does nothing elsewhere, or for memory that is no file's."""
    madvise = getattr(ctypes.CDLL(None), "madvise", None) if sys.platform == "linux" else None
    if madvise is None or tensor.device.type != "cpu" or not _is_mapped(tensor.data_ptr()):
        return
    page, start = os.sysconf("SC_PAGESIZE"), tensor.data_ptr()
    first, end = -(-start // page) * page, (start + tensor.nbytes) // page * page
    if first < end:
        madvise(ctypes.c_void_p(first), ctypes.c_size_t(end - first), _MADV_PAGEOUT)


def _is_mapped(address: int) -> bool:
    """Whether there is a file behind ``address``: else its page would go to swap memory."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        place, _, _, _, inode, *_ = line.split()
        start, end = (int(number, 16) for number in place.split("-"))
        if start <= address < end:
            return inode != "0"
    return False
