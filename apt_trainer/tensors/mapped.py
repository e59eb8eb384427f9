"""Weights that lie in a mapping of their file, of which a process holds the pages that it has read."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

import numpy as np
import torch

_MADV_DONTNEED, _MADV_PAGEOUT = 4, 21  # madvise(2), of Linux
_PRESENT, _SWAPPED, _OF_FILE = (np.uint64(1 << bit) for bit in (63, 62, 61))  # proc_pid_pagemap(5)


def let_go_of_pages(tensor: torch.Tensor) -> None:
    """Tell Linux that ``tensor`` is not going to be read soon: whole pages of it leave this process, and are read
    again if they are. A hint, which changes no value; does nothing elsewhere, or for memory that is no file's."""
    madvise = getattr(ctypes.CDLL(None), "madvise", None) if sys.platform == "linux" else None
    if madvise is None or tensor.device.type != "cpu" or not _is_mapped(tensor.data_ptr()):
        return
    page, start = os.sysconf("SC_PAGESIZE"), tensor.data_ptr()
    first, end = -(-start // page) * page, (start + tensor.nbytes) // page * page
    if first < end:
        # the first takes pages that other processes have mapped too, but forgets what was written to them
        advice = _MADV_DONTNEED if _is_as_in_file(first, end, page) else _MADV_PAGEOUT
        madvise(ctypes.c_void_p(first), ctypes.c_size_t(end - first), advice)


def _is_as_in_file(first: int, end: int, page: int) -> bool:
    """Whether no page from ``first`` to ``end`` was written to, which would have made it one of this process alone."""
    try:
        with open("/proc/self/pagemap", "rb") as pages:
            pages.seek(first // page * 8)
            found = np.frombuffer(pages.read((end - first) // page * 8), np.uint64)
    except OSError:
        return False
    held = (found & (_PRESENT | _SWAPPED)) != 0
    return len(found) == (end - first) // page and not (held & ((found & _OF_FILE) == 0)).any()


def _is_mapped(address: int) -> bool:
    """Whether there is a file behind ``address``: else its page would go to swap memory."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        place, _, _, _, inode, *_ = line.split()
        start, end = (int(number, 16) for number in place.split("-"))
        if start <= address < end:
            return inode != "0"
    return False
