"""ZeRO-3 on two real processes with other models and settings than ``test_zero``, each as one process runs it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from apt_trainer import APTTrainer
from apt_trainer.models import family_of
from apt_trainer.tensors import partitioned as partition
from apt_trainer.tensors.partitioned import shape_of
from apt_trainer.training.between_steps import BetweenSteps
from integration.factories import GLOBAL_BATCH, SHORT, losses_of, make_trainer, unpadded
from integration.test_nri_before import NRI
from integration.test_nri_during import DURING
from integration.test_processes import two_processes
from integration.test_pruned_before import BEFORE

IDENTITY = {"distillation_transform": "identity"}
CASES: dict[str, dict[str, Any]] = {
    "llama": {},
    "gpt2": {},
    "t5": {},
    "before": {**BEFORE, "importance": "magnitude"},
    "nri": NRI,
    "nri during": {**DURING, "distillation": "none", "calibration_samples": 17},  # the last row is of one process
    "teacher": {"distillation": "model", "teacher_name_or_path": "given"},
    "norms": {"tune": "adapters_and_norms", "activation_checkpointing": True, "importance": "taylor"},
    "faded": {
        "prune_targets": ["hidden"],
        "target_sparsity": 0.3,
        "gradient_checkpointing": True,
        "distillation": "none",
    },
    "full": {
        "tune": "full",
        "tune_embeddings": True,
        "rank_growth": "none",
        "preset_overrides": IDENTITY,
    },
}
"""What differs from ``SHORT``; the first three name models."""
HALVES = {"models": list(CASES)[:3], "settings": list(CASES)[3:]}


def trained(folder: Path, name: str, held: Held | None = None, **changes: Any) -> APTTrainer:
    """Rows without padding, so that the batches of two processes weigh the same."""
    model, data, options = unpadded(name)
    if held is not None:
        options["callbacks"] = [held]
    trainer = make_trainer(folder, model, data, options, **{**SHORT, "max_grad_norm": 1.0, **CASES[name], **changes})
    if held is not None:
        held.trainer = trainer
        held.watch_gathers()
    trainer.train()
    return trainer


class Held(TrainerCallback):
    """Which matrices were whole between steps, of the student or its teacher, and how many the two shared; and how
    many entries of matrices were whole at once at an event."""

    def __init__(self) -> None:
        self.whole, self.shared, self.most = set[str](), 0, 0
        self.trainer: APTTrainer | None = None
        self._in_event = False

    def watch_gathers(self, gathered: Any = partition._gathered) -> None:
        assert self.trainer is not None
        self.trainer.between_steps._change_shape = self._change_shape  # type: ignore[method-assign]

        @contextmanager
        def watched(parameters: Iterable[torch.nn.Parameter]) -> Iterator[None]:
            with gathered(parameters):
                self.most = max(self.most, self._entries() if self._in_event else 0)
                yield

        partition._gathered = watched  # type: ignore[assignment]

    def _entries(self) -> int:
        assert self.trainer is not None
        models = filter(None, (self.trainer.model, self.trainer.distillation.teacher.model))
        matrices = {id(p): p for model in models for p in model.parameters() if len(shape_of(p)) > 1}
        return sum(p.numel() for p in matrices.values())

    def _change_shape(self, *args: Any) -> None:
        """Outside of it DeepSpeed keeps what it has fetched up to its own ``stage3_max_live_parameters``."""
        assert self.trainer is not None
        self._in_event = True
        BetweenSteps._change_shape(self.trainer.between_steps, *args)
        self._in_event = False

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self.trainer is not None
        models = self.trainer.model, self.trainer.distillation.teacher.model
        for model in models:
            if model is not None:
                named = model.named_parameters()
                self.whole |= {name for name, p in named if p.numel() > 0 and len(shape_of(p)) > 1}
        if models[1] is not None:
            self.shared = max(
                self.shared, len({id(p) for p in models[0].parameters()} & {id(p) for p in models[1].parameters()})
            )


def largest_layer(model: Any) -> int:
    """Entries of the matrices of the block, or of the embedding, that has most."""
    paths = family_of(model.config).block_modules(model)
    blocks = [[p for p in model.get_submodule(path).parameters() if p.dim() > 1] for path in paths]
    return max(sum(p.numel() for p in block) for block in [*blocks, [model.get_input_embeddings().weight]])


WORKER = """
import json, os, sys
sys.path[:0] = [{root!r}, {tests!r}]
from pathlib import Path
import torch
torch.set_num_threads(1)
from integration.factories import GLOBAL_BATCH, losses_of
from integration.test_zero import deepspeed_config
from integration.test_zero3 import HALVES, Held, trained

folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
for name in HALVES["@"]:
    zero = {{"deepspeed": deepspeed_config(3), "per_device_train_batch_size": GLOBAL_BATCH // 2}}
    held = Held()
    trainer = trained(folder / name, name, held, **zero)
    trainer.save_model(str(folder / name / "model"))
    result = {{"plan": trainer.pruner.plan.to_json(), "losses": losses_of(trainer)}}
    result |= {{"whole": sorted(held.whole), "shared": held.shared, "most": held.most}}
    (folder / f"{{name}}.{{rank}}.json").write_text(json.dumps(result))
torch.distributed.barrier()
os._exit(0)
"""


@pytest.mark.distributed
@pytest.mark.parametrize("half", HALVES)
def test_other_models_and_settings_equal_one_process(half: str, tmp_path: Path) -> None:
    """Several runs in a test, since starting two processes takes longer than a run in them."""
    results = [f"{name}.{rank}.json" for name in HALVES[half] for rank in (0, 1)]
    two_processes(tmp_path, WORKER.replace("@", half), *results)
    for name in HALVES[half]:
        expected = trained(tmp_path / "single" / name, name, per_device_train_batch_size=GLOBAL_BATCH)
        losses = losses_of(expected)
        for rank in (0, 1):
            result = json.loads((tmp_path / f"{name}.{rank}.json").read_text())
            assert result["plan"] == expected.pruner.plan.to_json(), name
            assert not name.startswith("nri") or 0 in expected.pruner.plan.counts.values()
            assert result["whole"] == [], name
            if name not in ("before", "nri"):  # where the dense model is whole while it is scored
                assert 0 < result["most"] <= largest_layer(unpadded(name)[0]), name
            assert (result["shared"] > 10) == (name in ("llama", "gpt2", "t5", "norms")), (name, result["shared"])
            assert len(losses) == 12
            for step, values in losses.items():
                # rounding of the gradients of norms, which Adam scales up
                tolerance = 1e-5 if name == "norms" else 1e-6
                assert result["losses"][str(step)][0] == pytest.approx(values[0], rel=tolerance), (name, step)
