"""Peak memory of running one model, measured in a process of its own so that no other work shows in it.

``python -m apt_trainer.evaluate.peak REQUEST`` is that process: it prints one line of JSON. Not for the memory of
training: a run reports that itself.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from apt_trainer.errors import UserError
from apt_trainer.measure import (
    PeakMemory,
    current_memory_bytes,
    evaluating,
    example_inputs,
    generate_once,
    peak_memory_bytes,
    reset_peak,
    return_freed_memory,
)
from apt_trainer.settings import ModelSettings
from apt_trainer.store.pretrained import load_dense_shape, load_saved


@dataclass(frozen=True)
class PeakRequest:
    """What the process runs: the model of ``settings``, or its dense shape, at one size on one device."""

    settings: dict[str, Any]
    dense_shape: bool
    batch_size: int
    length: int
    new_tokens: int
    device: str


def measure_peak(request: PeakRequest) -> dict[str, Any]:
    """Run ``request`` in a fresh process.

    Returns:
        ``weight_bytes``: of the model's tensors. ``peak_bytes``: those plus what running adds to the process at most,
        whether the weights were read from a file or made.
        ``includes_loading``: this system cannot start the peak anew, so it is that of loading and running, above the
        process without a model.

    Raises:
        UserError: the process failed; with the last line it wrote.
    """
    command = [sys.executable, "-m", "apt_trainer.evaluate.peak", json.dumps(asdict(request))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise UserError(f"Measuring memory at batch {request.batch_size} × {request.length} failed: {lines[-1]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def run(request: PeakRequest) -> dict[str, Any]:
    """What the process does; the result of :func:`measure_peak`."""
    return_freed_memory()
    memory = PeakMemory(request.device)
    settings = ModelSettings(**request.settings)
    model = load_dense_shape(settings) if request.dense_shape else load_saved(settings)
    model = model.to(torch.device(request.device))
    tensors = (*model.parameters(), *model.buffers())
    weights = sum(t.numel() * t.element_size() for t in tensors)
    _read(tensors)
    _use(model, 1, 2, 1)  # what the first call imports and builds is not the model's
    gc.collect()
    anew, before = reset_peak(request.device), current_memory_bytes(request.device)
    _use(model, request.batch_size, request.length, request.new_tokens)
    peak = weights + max(0, peak_memory_bytes(request.device) - before) if anew else memory.above_start()
    return {"peak_bytes": peak, "weight_bytes": weights, "includes_loading": not anew}


def _read(tensors: Iterable[Tensor]) -> None:
    """Make all weights resident. Those of a file are mapped, and a page of it becomes a part of the process when it is
    first read: in the embeddings that would be during the measured call, which would count it again."""
    for tensor in tensors:
        torch.count_nonzero(tensor)


def _use(model: PreTrainedModel, batch_size: int, length: int, new_tokens: int) -> None:
    if model.can_generate():
        generate_once(model, batch_size, length, new_tokens)
        return
    with evaluating(model):
        model(**example_inputs(model, batch_size, length))


if __name__ == "__main__":
    try:
        sys.stdout.write(json.dumps(run(PeakRequest(**json.loads(sys.argv[1])))) + "\n")
    except UserError as error:
        sys.exit(str(error))
