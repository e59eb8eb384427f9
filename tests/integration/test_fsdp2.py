"""FSDP2 on two real processes gives the run of one process, and checkpoints move between the two."""

from __future__ import annotations

import functools
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import warm
from safetensors.torch import load_file
from tiny import tiny_model
from transformers import TrainerCallback

from apt_trainer import APTConfig, APTTrainer, load_pruned
from apt_trainer.cli.launch import PROFILES
from apt_trainer.errors import UserError
from apt_trainer.tensors.fully_sharded import is_dtensor
from integration.factories import (
    DEFAULTS,
    GLOBAL_BATCH,
    SAVED,
    SHORT,
    Rows,
    comparable,
    events_of,
    losses_of,
    make_trainer,
    unpadded,
    weights_of,
)
from integration.test_nri_before import NRI
from integration.test_nri_during import DURING
from integration.test_processes import ROOT, two_processes
from integration.test_pruned_before import BEFORE
from integration.test_zero import logits_of

FSDP: dict[str, Any] = {"fsdp": True, "fsdp_config": {"version": 2}}


class Held(TrainerCallback):
    """Which parameters were whole when gradients were there, of the student or its teacher; by step, how many parts
    the two shared; and how much was whole in the model whenever FSDP2 was put on a unit again."""

    def __init__(self) -> None:
        self.whole, self.shared, self.units = set[str](), dict[int, int](), list[int]()
        self.trainer: APTTrainer | None = None
        self._put_on = torch.distributed.fsdp.fully_shard

    def watch_units(self) -> None:
        @functools.wraps(self._put_on)
        def watched(unit: Any, **kwargs: Any) -> Any:
            if self.trainer is not None and self.trainer.live_dataloader is not None:
                whole = (p.numel() for p in self.trainer.model.parameters() if not (is_dtensor(p) or p.is_meta))
                self.units.append(sum(whole))
            return self._put_on(unit, **kwargs)

        torch.distributed.fsdp.fully_shard = watched

    def unwatch_units(self) -> None:
        torch.distributed.fsdp.fully_shard = self._put_on

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self.trainer is not None
        student, teacher = self.trainer.model, self.trainer.distillation.teacher.model
        parts = [[] if model is None else list(model.named_parameters()) for model in (student, teacher)]
        self.whole |= {name for named in parts for name, parameter in named if not is_dtensor(parameter)}
        ours, theirs = ({id(parameter) for _, parameter in named} for named in parts)
        self.shared[state.global_step + 1] = len(ours & theirs)


def trained(
    folder: Path, saved: tuple[int, ...] = (), resume: Path | None = None, held: Held | None = None, **changes: Any
) -> APTTrainer:
    """As the function of ``factories``, watched by ``held``."""
    trainer = comparable(folder, saved, [] if held is None else [held], **changes)
    if held is not None:
        held.trainer = trainer
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return trainer


def evaluations_of(trainer: APTTrainer) -> dict[int, float]:
    return {entry["step"]: entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry}


START = """
import gc, json, os, sys
sys.path[:0] = [{root!r}, {tests!r}]
from pathlib import Path
import torch
torch.set_num_threads(1)
from safetensors.torch import save_file
from integration import test_fsdp2 as module
from integration.factories import losses_of, weights_of

folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
"""
END = """
torch.distributed.barrier()
os._exit(0)
"""
RUNS = """
module.trained(folder / "ddp", module.SAVED, per_device_train_batch_size=module.GLOBAL_BATCH // 2)
for name, (source, steps) in module.CASES.items():
    resume = None if source is None else folder / source
    options = {{"gradient_accumulation_steps": steps}}
    options["per_device_train_batch_size"] = module.GLOBAL_BATCH // 2 // steps
    held = module.Held()
    held.watch_units()
    saved = module.SAVED if resume is None else ()
    trainer = module.trained(folder / name, saved, resume, held, **module.FSDP, **options)
    held.unwatch_units()
    gc.collect()
    weights = weights_of(trainer.model)
    save_file({{"logits": module.logits_of(trainer), **weights}}, folder / f"{{name}}.{{rank}}.safetensors")
    result = {{
        "world": trainer.args.world_size,
        "plan": trainer.pruner.plan.to_json(),
        "losses": losses_of(trainer),
        "evaluations": module.evaluations_of(trainer),
        "eval_loss": trainer.evaluate()["eval_loss"],
        "whole": sorted(held.whole),
        "shared": [held.shared[step] for step in sorted(held.shared)],
        "units": held.units,
        "states": sum(type(thing).__name__ == "FSDPState" for thing in gc.get_objects()),
    }}
    trainer.save_model(str(folder / name / "model"))
    (folder / f"{{name}}.{{rank}}.json").write_text(json.dumps(result))
"""
IDENTITY = {"distillation_transform": "identity"}
CASES: dict[str, tuple[str | None, int]] = {
    "straight": (None, 1),
    "again": ("straight/checkpoint-10", 1),
    "from_single": ("single/checkpoint-6", 2),
    "from_ddp": ("ddp/checkpoint-10", 1),
}
"""Name of a run → the checkpoint that it goes on from, and batches accumulated."""


def _result(folder: Path, name: str, rank: int) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    return json.loads((folder / f"{name}.{rank}.json").read_text()), load_file(folder / f"{name}.{rank}.safetensors")


def _assert_equals_single(folder: Path, name: str, expected: APTTrainer) -> None:
    (first, weights), (second, others) = (_result(folder, name, rank) for rank in (0, 1))
    assert first["world"] == second["world"] == 2
    assert first["plan"] == second["plan"] == expected.pruner.plan.to_json()
    assert first["whole"] == second["whole"] == []
    assert first["states"] == second["states"] == 0
    assert all(torch.equal(weight, others[key]) for key, weight in weights.items())
    losses, evaluations = losses_of(expected), evaluations_of(expected)
    assert len(first["losses"]) == len(losses) == 20
    for step, values in losses.items():
        assert first["losses"][str(step)][0] == pytest.approx(values[0], rel=1e-5)
    assert list(evaluations) == [7, 14, 20]
    for step, value in evaluations.items():
        assert first["evaluations"][str(step)] == pytest.approx(value, rel=1e-5)
    assert torch.allclose(weights.pop("logits"), logits_of(expected), atol=1e-5)
    assert weights.keys() == weights_of(expected.model).keys()


@pytest.mark.distributed
def test_fsdp2_equals_one_process_and_checkpoints_move_between_them(
    single: tuple[Path, APTTrainer], tmp_path: Path
) -> None:
    """One test, since starting two processes takes longer than the runs in them."""
    (tmp_path / "single").symlink_to(single[0])
    results = [f"{name}.{rank}.json" for name in CASES for rank in (0, 1)]
    two_processes(tmp_path, START + RUNS + END, *results)
    for name in CASES:
        _assert_equals_single(tmp_path, name, single[1])
    straight, resumed = (_result(tmp_path, name, 0) for name in ("straight", "again"))
    # a cut leaves what has another shape afterwards to the teacher alone; a teacher read from a file shares nothing
    assert straight[0]["shared"] == [0, 0, *[53] * 6, *[43] * 6, *[33] * 3, 0, 0, 0]
    assert resumed[0]["shared"] == [0] * 10
    # three layers and the rest, at each of five changes of shape; the transform is made before FSDP2 has seen it
    assert straight[0]["units"] == [64] * 4 + [0] * 16
    assert straight[0]["losses"] == resumed[0]["losses"]
    assert [key for key, value in straight[1].items() if not torch.equal(value, resumed[1][key])] == []
    records = [(r["step"], r["kind"], r["block_params"], r["ranks"]) for r in events_of(tmp_path / "straight")]
    assert records == [(r["step"], r["kind"], r["block_params"], r["ranks"]) for r in events_of(single[0])]

    again = load_pruned(tmp_path / "straight" / "model").eval()
    with torch.no_grad():
        logits = again(input_ids=Rows(16, padded=False).ids).logits
    assert torch.allclose(logits, straight[1]["logits"], atol=1e-6)

    for step in SAVED:  # and back to one process
        source = tmp_path / "straight" / f"checkpoint-{step}"
        kinds = {file.suffix for file in source.iterdir() if not file.name.startswith("rng_state")}
        assert kinds == {".json", ".safetensors"}
        back = trained(tmp_path / f"back{step}", (), source, per_device_train_batch_size=GLOBAL_BATCH)
        assert back.pruner.plan == single[1].pruner.plan
        assert torch.allclose(logits_of(back), logits_of(single[1]), atol=1e-5)


EVALUATED = (14, 16, 18, 20)
"""From the last cut on."""
BEST: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "eval_steps": 2, "metric_for_best_model": "loss"}
BEST |= {"load_best_model_at_end": True}
ALONE = """
for name, source, saved, changes in (
    ("alone", None, (), {{}}),
    ("bf16", None, (10,), {{"bf16": True}}),
    ("bf16 again", "bf16/checkpoint-10", (), {{"bf16": True}}),
    ("best", None, module.EVALUATED, module.BEST),
):
    held = module.Held()
    resume = None if source is None else folder / source
    trainer = module.trained(folder / name, saved, resume, held, per_device_train_batch_size=8, **changes)
    result = {{"plan": trainer.pruner.plan.to_json(), "losses": losses_of(trainer), "whole": sorted(held.whole)}}
    result["best"] = Path(trainer.state.best_model_checkpoint or "").name
    trainer.evaluate()
    trainer.save_model(str(folder / name / "model"))  # compares its logits with those of what it has written
    save_file({{"logits": module.logits_of(trainer)}}, folder / f"{{name}}.safetensors")
    (folder / f"{{name}}.json").write_text(json.dumps(result))
"""


@pytest.mark.distributed
def test_the_profile_trains_one_process_too(single: tuple[Path, APTTrainer], tmp_path: Path) -> None:
    """FSDP is asked for by the profile alone; bf16 goes on from a checkpoint as if it had not stopped; the best
    checkpoint is found and loaded."""
    worker = tmp_path / "worker.py"
    worker.write_text((START + ALONE).format(root=str(ROOT), tests=str(Path(__file__).parents[1])))
    launcher = [warm.python(), "-m", "accelerate.commands.launch", "--num_processes", "1"]
    subprocess.run(
        [*launcher, "--config_file", str(PROFILES / "fsdp2.yaml"), str(worker), str(tmp_path)],
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        check=True,
        timeout=280,
    )
    names = ("alone", "bf16", "bf16 again", "best")
    results = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in names}
    assert all(result["whole"] == [] for result in results.values())
    assert results["alone"]["plan"] == single[1].pruner.plan.to_json()
    for step, values in losses_of(single[1]).items():
        assert results["alone"]["losses"][str(step)] == pytest.approx(values, rel=1e-5)
        assert results["bf16"]["losses"][str(step)][0] == pytest.approx(values[0], rel=0.03)
    assert torch.allclose(load_file(tmp_path / "alone.safetensors")["logits"], logits_of(single[1]), atol=1e-5)
    straight, again = (results[name]["losses"] for name in ("bf16", "bf16 again"))
    assert list(straight) == list(again) and straight == again
    logits = [load_file(tmp_path / f"{name}.safetensors")["logits"] for name in ("bf16", "bf16 again")]
    assert torch.equal(*logits)

    best = trained(tmp_path / "single best", EVALUATED, per_device_train_batch_size=GLOBAL_BATCH, **BEST)
    assert best.state.best_model_checkpoint is not None
    assert results["best"]["best"] == Path(best.state.best_model_checkpoint).name
    assert torch.allclose(load_file(tmp_path / "best.safetensors")["logits"], logits_of(best), atol=1e-5)


# ------------------------------------------------------------------ other models and settings

OTHERS: dict[str, dict[str, Any]] = {
    "llama": {},
    "t5": {},
    "before": {**BEFORE, "importance": "magnitude"},
    "nri": NRI,
    "nri during": {**DURING, "distillation": "none", "calibration_samples": 17},  # the last row is of one process
    "bf16": {"bf16": True},
    "teacher": {"distillation": "model", "teacher_name_or_path": "given"},
    "norms": {"tune": "adapters_and_norms", "activation_checkpointing": True, "importance": "taylor"},
    "full": {
        "tune": "full",
        "tune_embeddings": True,
        "rank_growth": "none",
        "preset_overrides": IDENTITY,
    },
}
"""What differs from ``SHORT``; the first two name models."""
HALVES = {"one": list(OTHERS)[:5], "other": list(OTHERS)[5:]}
MORE = """
for name in module.HALVES["@"]:
    held = module.Held()
    options = {{**module.FSDP, "per_device_train_batch_size": module.GLOBAL_BATCH // 2}}
    trainer = module.other(folder / name, name, held, **options)
    trainer.save_model(str(folder / name / "model"))
    result = {{"plan": trainer.pruner.plan.to_json(), "losses": losses_of(trainer)}}
    result |= {{"whole": sorted(held.whole), "shared": max(held.shared.values())}}
    result["types"] = sorted({{str(parameter.dtype) for parameter in trainer.model.parameters()}})
    (folder / f"{{name}}.{{rank}}.json").write_text(json.dumps(result))
"""


def other(folder: Path, name: str, held: Held | None = None, **changes: Any) -> APTTrainer:
    """A run of ``OTHERS``."""
    model, data, options = unpadded(name)
    if held is not None:
        options["callbacks"] = [held]
    trainer = make_trainer(folder, model, data, options, **{**SHORT, "max_grad_norm": 1.0, **OTHERS[name], **changes})
    if held is not None:
        held.trainer = trainer
    trainer.train()
    return trainer


@pytest.mark.distributed
@pytest.mark.parametrize("half", HALVES)
def test_other_models_and_settings_equal_one_process(half: str, tmp_path: Path) -> None:
    """Several runs in a test, since starting two processes takes longer than a run in them."""
    results = [f"{name}.{rank}.json" for name in HALVES[half] for rank in (0, 1)]
    two_processes(tmp_path, START + MORE.replace("@", half) + END, *results)
    for name in HALVES[half]:
        expected = other(tmp_path / "single" / name, name, per_device_train_batch_size=GLOBAL_BATCH)
        losses = losses_of(expected)
        assert len(losses) == 12
        for rank in (0, 1):
            result = json.loads((tmp_path / f"{name}.{rank}.json").read_text())
            assert result["whole"] == [], name
            assert result["types"] == ["torch.float32"], name
            assert (result["shared"] > 10) == (name in ("llama", "t5", "bf16", "norms")), (name, result["shared"])
            # bf16: rounded where autocast does not; norms: rounding of their gradients, which Adam scales up
            tolerance = {"bf16": 2e-2, "norms": 1e-5}.get(name, 1e-6)
            assert name == "bf16" or result["plan"] == expected.pruner.plan.to_json(), name
            for step, values in losses.items():
                assert result["losses"][str(step)][0] == pytest.approx(values[0], rel=tolerance), (name, step)


# ------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fsdp_config": {"version": 1}}, "FSDP1"),
        ({"fsdp_config": {"cpu_offload": True}}, "cpu_offload.*zero3_offload"),
        ({"fsdp_config": {"activation_checkpointing": True}}, "activation_checkpointing in the recipe"),
        ({"fsdp_config": {"cpu_ram_efficient_loading": True}}, "cpu_ram_efficient_loading"),
        ({"fp16": True}, "Use bf16"),
        ({"torch_compile": True}, "torch_compile"),
        ({"dense_baseline": True}, "dense_baseline starts a process of its own"),
        ({"optim": "adafactor"}, "optim: adafactor"),
        ({"save_only_model": True, "load_best_model_at_end": True}, "save_only_model"),
        ({"preset": "paper"}, "Use preset: ours"),
    ],
)
def test_settings_that_do_not_work_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], message: str
) -> None:
    for variable, value in {"RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(variable, value)
    with pytest.raises(UserError, match=message):
        APTConfig(output_dir=str(tmp_path / "run"), **{**DEFAULTS, **FSDP, **changes})
    assert not (tmp_path / "run").exists()


def test_settings_of_a_launcher_are_refused_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    for values, message in (
        ({}, "FSDP1"),
        ({"FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "true"}, "cpu_offload"),
        ({"FSDP_OFFLOAD_PARAMS": "false", "FSDP_IGNORED_MODULES": "a"}, "ignored_modules"),
        ({"FSDP_IGNORED_MODULES": "", "ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, "parallelism_config"),
    ):
        for variable, value in values.items():
            monkeypatch.setenv(variable, value)
        with pytest.raises(UserError, match=message):
            APTConfig(output_dir=str(tmp_path), **DEFAULTS)


def test_a_launch_without_accelerators_or_a_launcher_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(UserError, match="needs a launcher, also for one process"):
        APTConfig(output_dir=str(tmp_path), **{**DEFAULTS, **FSDP})
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    with pytest.raises(UserError, match="this machine has no accelerator.*fsdp2_cpu"):
        APTConfig(output_dir=str(tmp_path), **{**DEFAULTS, **FSDP, "use_cpu": False})


def test_a_run_in_which_accelerate_left_fsdp_off_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What ``check_fsdp_launch`` cannot foresee."""
    monkeypatch.setattr("apt_trainer.training.reshape.wants_fsdp", lambda args: True)
    with pytest.raises(UserError, match="accelerate has not switched it on"):
        make_trainer(tmp_path, tiny_model("bert"))
