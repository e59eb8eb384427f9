"""``apt-trainer env``: versions and hardware, for a bug report."""

from __future__ import annotations

import argparse
import os
import platform
from collections.abc import Sequence

from apt_trainer.libraries.versions import installed, newer, refusal, tested_ranges

HELP = "Print the versions and the hardware that a bug report needs."
TAKES_SETTINGS = False

PACKAGES = ("apt_trainer", "torch", "transformers", "peft", "accelerate", "deepspeed", "datasets", "safetensors")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """No arguments."""


def run(args: argparse.Namespace, overrides: Sequence[str]) -> int:
    rows = {"python": platform.python_version(), "platform": platform.platform()}
    hardware = _hardware()  # first: torch, once imported, says for what hardware it was built
    rows |= {package: installed(package) or "not installed" for package in PACKAGES}
    rows |= {"versions": refusal() or " ".join(newer()) or f"tested with {tested_ranges()}"}
    rows |= hardware
    for name, value in rows.items():
        print(f"{name:<13} {value}")
    return 0


def _hardware() -> dict[str, str]:
    import psutil

    memory = psutil.virtual_memory()
    return {
        "cores": str(os.cpu_count()),
        "memory": f"{memory.total / 2**30:.1f} GiB, {memory.available / 2**30:.1f} GiB available",
        "accelerator": _accelerator(),
    }


def _accelerator() -> str:
    try:
        import torch
    except ImportError:
        return "unknown without torch"
    device = torch.accelerator.current_accelerator(check_available=True)
    if device is None:
        return "none"
    name = torch.cuda.get_device_name() if device.type == "cuda" else device.type
    return f"{torch.accelerator.device_count()} x {name}"
