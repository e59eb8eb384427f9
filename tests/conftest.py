"""One thread per test process, the same random numbers in every test, quick garbage collection, long tests first."""

from __future__ import annotations

import gc
import math
import os
import signal

os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch
import warm

torch.set_num_threads(1)
warm.remember_what_is_installed()
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell ignores for what it starts in the background


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Modules with tests that take long come first: at the end no test process waits long for another."""
    long = {item.path for item in items for name in ("distributed", "slow") if item.get_closest_marker(name)}
    items.sort(key=lambda item: item.path not in long)


def pytest_collection_finish() -> None:
    """What is imported by now stays: runs, which collect garbage at every change of shape, need not look at it."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def no_waiting_for_steady_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test asserts a time, and beside another test process none would be steady before 20 seconds are over."""
    monkeypatch.setattr("apt_trainer.measure.latency.STEADY", math.inf)
