"""What two real processes hold while a model that is split between them changes shape, counted in bytes of tensors.

"One layer": the largest block with its adapters, or all that is in no block. Between changes each has its part.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_model
from transformers import PreTrainedModel

from integration.factories import GLOBAL_BATCH, SHORT, Rows, make_trainer
from integration.test_fsdp2 import FSDP
from integration.test_processes import two_processes
from integration.test_zero import with_zero

ENGINES: dict[str, dict[str, Any]] = {
    "zero3": {"deepspeed": with_zero(reduce_bucket_size=5000)},  # else its buffer is all there is to see
    "fsdp2": FSDP,
}
SLACK = 4096
"""Bytes of what is small: indices of units, vectors, the state of adapters."""
LAYERS = {"zero3": 1.0, "fsdp2": 1.5}
"""How many layers are whole at once; under FSDP2 one, and beside it the new part of it, a half in two processes."""
RUNS: dict[str, tuple[dict[str, Any], float]] = {
    "heads and neurons": ({"prune_targets": ["heads", "neurons"]}, 0.0),
    "hidden too": ({}, 0.15),
    "no teacher": ({"distillation": "none"}, 0.65),
}
"""Name → settings, and how many of its parts of the model a process may have on top of that at a cut.

What is cut on both sides is there in between, and what no teacher keeps goes only once all is cut.
"""
STEPS = {"heads and neurons": [2, 5, 8, 10], "hidden too": [2, 5, 8, 10], "no teacher": [5, 8]}
"""After which the shape changes; 2 and 10: a transform comes and goes."""


def dense() -> PreTrainedModel:
    return tiny_model("bert", hidden_size=64, intermediate_size=256)


def train(folder: Path, engine: str, name: str) -> None:
    """A run of ``RUNS``; no padding, so that batches divide."""
    settings = {**SHORT, **ENGINES[engine], "per_device_train_batch_size": GLOBAL_BATCH // 2, **RUNS[name][0]}
    options = {"heldout_dataset": Rows(16, padded=False)}
    make_trainer(folder / name, dense(), Rows(96, padded=False), options, **settings).train()


WORKER = """
import json, os, sys
sys.path[:0] = [{root!r}, {tests!r}, {root!r} + "/scripts"]
from dataclasses import asdict
from pathlib import Path
import torch
torch.set_num_threads(1)
from event_memory import watch_changes
from integration.test_event_memory import RUNS, train

folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
changes = watch_changes()
for name in RUNS:
    changes.clear()
    train(folder, "@", name)
    (folder / f"{{name}}.{{rank}}.json").write_text(json.dumps([asdict(change) for change in changes]))
torch.distributed.barrier()
os._exit(0)
"""


@pytest.mark.distributed
@pytest.mark.parametrize("engine", ENGINES)
def test_a_change_of_shape_takes_one_layer_above_what_is_there_anyway(engine: str, tmp_path: Path) -> None:
    results = [f"{name}.{rank}.json" for name in RUNS for rank in (0, 1)]
    two_processes(tmp_path, WORKER.replace("@", engine), *results)
    part = sum(parameter.numel() * parameter.element_size() for parameter in dense().parameters()) // 2
    for result in results:
        name = result.partition(".")[0]
        changes = json.loads((tmp_path / result).read_text())
        assert [change["step"] for change in changes] == STEPS[name]
        for change in changes:
            more = change["most"] - max(change["before"], change["after"])
            assert more <= LAYERS[engine] * change["layer"] + RUNS[name][1] * part + SLACK, (result, change)
            assert change["before"] > 0.5 * part, "the student is not seen"
            assert change["layer"] < 0.7 * part, "a layer that is most of the model proves nothing"
