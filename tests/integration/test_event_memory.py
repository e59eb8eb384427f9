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

from apt_trainer import APTTrainer
from apt_trainer.models import HIDDEN
from integration.factories import GLOBAL_BATCH, SHORT, Rows, make_trainer
from integration.test_fsdp2 import FSDP
from integration.test_processes import two_processes
from integration.test_zero import with_zero

ENGINES: dict[str, dict[str, Any]] = {
    "fsdp2": FSDP,
    "zero3": {"deepspeed": with_zero(reduce_bucket_size=5000)},  # else its buffer is all there is to see
}
RUNS: dict[str, tuple[dict[str, Any], list[int]]] = {
    "teacher": ({}, [2, 5, 8, 10]),
    "alone": ({"distillation": "none"}, [5, 8]),
    "full": ({"tune": "full", "target_sparsity": 0.75}, [2, 5, 8, 10]),
}
"""Name → settings, and after which steps the shape changes; 2 and 10: a transform comes and goes."""
WIDTH, NEURONS = 64, 256


def dense() -> PreTrainedModel:
    """Its embeddings are its largest layer, nearly all of it one matrix."""
    return tiny_model("bert", hidden_size=WIDTH, intermediate_size=NEURONS, type_vocab_size=1000)


def train(folder: Path, engine: str, name: str) -> APTTrainer:
    """A run of ``RUNS``; no padding, so that batches divide."""
    settings = {**SHORT, **ENGINES[engine], "per_device_train_batch_size": GLOBAL_BATCH // 2, **RUNS[name][0]}
    options = {"heldout_dataset": Rows(16, padded=False)}
    trainer = make_trainer(folder / name, dense(), Rows(96, padded=False), options, **settings)
    trainer.train()
    return trainer


WORKER = """
import json, os, sys
sys.path[:0] = [{root!r}, {tests!r}, {root!r} + "/scripts"]
from dataclasses import asdict
from pathlib import Path
import torch
torch.set_num_threads(1)
from event_memory import watch_changes
from integration.test_event_memory import ENGINES, RUNS, train

folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
changes = watch_changes()
for engine in ENGINES:
    os.environ.pop("ACCELERATE_USE_FSDP", None)  # which the first engine leaves
    for name in RUNS:
        changes.clear()
        plan = train(folder / engine, engine, name).pruner.plan
        described = [asdict(change) | {{"more": change.more}} for change in changes]
        result = {{"changes": described, "counts": plan.counts}}
        (folder / f"{{engine}}.{{name}}.{{rank}}.json").write_text(json.dumps(result))
torch.distributed.barrier()
os._exit(0)
"""


@pytest.mark.distributed
def test_a_change_of_shape_takes_one_layer_above_what_is_there_anyway(tmp_path: Path) -> None:
    """Both engines in one pair of processes, since starting these takes longer than the runs."""
    cases = [(engine, name, rank) for engine in ENGINES for name in RUNS for rank in (0, 1)]
    two_processes(tmp_path, WORKER, *(f"{engine}.{name}.{rank}.json" for engine, name, rank in cases))
    part = sum(parameter.numel() * parameter.element_size() for parameter in dense().parameters()) // 2
    for case in cases:
        result = json.loads((tmp_path / "{}.{}.{}.json".format(*case)).read_text())
        counts, changes = result["counts"], result["changes"]
        assert counts[HIDDEN] < WIDTH and min(counts.values()) < 4 and counts["layers.0.neurons"] < NEURONS, counts
        assert [change["step"] for change in changes] == RUNS[case[1]][1]
        for change in changes:
            assert change["more"] <= change["layer"], (case, change)
            assert change["before"] > 0.5 * part, "the student is not seen"
            assert change["layer"] < 0.7 * part, "a layer that is most of the model proves nothing"
