"""DeepSpeed ZeRO on two real processes gives the run of one process, and checkpoints move between engines."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from apt_trainer import APTConfig, APTTrainer
from apt_trainer.errors import UserError
from apt_trainer.surgery.slicing import Grow, Keep
from apt_trainer.training.engines.agreement import outliers
from apt_trainer.training.engines.state import follow_master, step_tensor
from apt_trainer.training.engines.zero import ZeroEngine
from integration.factories import (
    DEFAULTS,
    GLOBAL_BATCH,
    SAVED,
    Rows,
    events_of,
    losses_of,
    trained,
    weights_of,
)
from integration.test_processes import two_processes


def deepspeed_config(stage: int) -> dict[str, Any]:
    """Of stage 3 with everything partitioned, however small, as in large models."""
    automatic = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size")
    return {
        **dict.fromkeys((*automatic, "gradient_clipping"), "auto"),
        "bf16": {"enabled": "auto"},
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 500_000, "stage3_param_persistence_threshold": 0},
    }


def with_zero(**settings: Any) -> dict[str, Any]:
    config = deepspeed_config(3)
    return config | {"zero_optimization": config["zero_optimization"] | settings}


ONLY_WEIGHTS: dict[str, Any] = {"load_best_model_at_end": True, "save_only_model": True}
ONLY_WEIGHTS |= {"eval_strategy": "steps", "save_strategy": "steps", "save_steps": 10, "eval_steps": 10}


class Spoiled(TrainerCallback):
    """Has one gradient of one process be no number in step 5."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step == 4 and args.process_index == self.rank:
            parameter = next(p for p in model.parameters() if p.requires_grad)
            parameter.register_hook(lambda gradient: torch.full_like(gradient, float("nan")))


def time_outs() -> list[float]:
    """Seconds after which a collective call gives up, of every group of processes."""
    groups = torch.distributed.distributed_c10d._world.pg_map
    return [group._get_backend(torch.device("cpu")).options._timeout.total_seconds() for group in groups]


def logits_of(trainer: APTTrainer) -> torch.Tensor:
    with torch.no_grad():
        return trainer.model.eval()(input_ids=Rows(16, padded=False).ids).logits.float()  # type: ignore[no-any-return]


WORKER = """
import gc, json, os, sys
sys.path[:0] = [{root!r}, {tests!r}]
from pathlib import Path
import torch
torch.set_num_threads(1)
from safetensors.torch import save_file
from apt_trainer.training.engines.agreement import Disagreement
from apt_trainer.errors import UserError
from integration.factories import GLOBAL_BATCH, SAVED, losses_of, make_trainer, trained, weights_of
from integration.test_zero import CASES, Spoiled, deepspeed_config, logits_of, time_outs, unset_hf_deepspeed_config

folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
for name, (stage, source, steps) in CASES["KIND"].items():
    resume = None if source is None else folder / source
    zero = {{"deepspeed": deepspeed_config(stage), "gradient_accumulation_steps": steps}}
    zero |= {{"per_device_train_batch_size": GLOBAL_BATCH // 2 // steps, "ddp_timeout": 123}}
    trainer = trained(folder / name, SAVED if resume is None else (), resume, **zero)
    gc.collect()
    save_file({{"logits": logits_of(trainer), **weights_of(trainer.model)}}, folder / f"{{name}}.{{rank}}.safetensors")
    result = {{
        "world": trainer.args.world_size,
        "plan": trainer.pruner.plan.to_json(),
        "time_outs": time_outs(),
        "losses": losses_of(trainer),
        "eval_loss": trainer.evaluate(trainer.heldout_dataset)["eval_loss"],
        "live_engines": sum(type(thing).__name__ == "DeepSpeedEngine" for thing in gc.get_objects()),
        "parts": sum(isinstance(thing, torch.nn.Parameter) and hasattr(thing, "ds_id") for thing in gc.get_objects()),
    }}
    trainer.save_model(str(folder / name / "model"))
    (folder / f"{{name}}.{{rank}}.json").write_text(json.dumps(result))
try:
    make_trainer(folder / "spoiled", options={{"callbacks": [Spoiled(1)]}}, **zero).train()
except UserError as error:
    (folder / f"spoiled.{{rank}}.txt").write_text(str(error))
unset_hf_deepspeed_config()  # which a run that has ended this way leaves
trainer = make_trainer(folder / "disagreeing", **zero)
if rank == 1:
    decide = trainer.pruner.decide
    trainer.pruner.decide = lambda step: decide(step) if step != 14 else None
try:
    trainer.train()
except Disagreement as error:
    (folder / f"disagreement.{{rank}}.txt").write_text(str(error))
torch.distributed.barrier()
os._exit(0)
"""

CASES: dict[str, dict[str, tuple[int, str | None, int]]] = {
    "zero2": {
        "straight": (2, None, 1),
        "again": (2, "straight/checkpoint-10", 1),
        "from_single": (1, "single/checkpoint-6", 2),
    },
    "zero3": {
        "straight": (3, None, 1),
        "again": (3, "straight/checkpoint-10", 1),
        "to_zero2": (2, "straight/checkpoint-6", 1),
        "from_single": (3, "single/checkpoint-6", 2),
    },
}
"""Name of a run → stage, the checkpoint that it goes on from, and batches accumulated."""


def _result(folder: Path, name: str, rank: int) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    return json.loads((folder / f"{name}.{rank}.json").read_text()), load_file(folder / f"{name}.{rank}.safetensors")


def _assert_equals_single(folder: Path, name: str, expected: APTTrainer) -> None:
    (first, weights), (second, others) = (_result(folder, name, rank) for rank in (0, 1))
    assert first["world"] == second["world"] == 2
    assert set(first["time_outs"]) == set(second["time_outs"]) == {123.0}
    assert first["live_engines"] == second["live_engines"] == first["parts"] == second["parts"] == 0
    assert first["plan"] == second["plan"] == expected.pruner.plan.to_json()
    assert all(torch.equal(weight, others[key]) for key, weight in weights.items())
    losses = losses_of(expected)
    assert len(first["losses"]) == len(losses)
    for step, values in losses.items():
        assert first["losses"][str(step)][0] == pytest.approx(values[0], rel=1e-5)
    assert torch.allclose(weights.pop("logits"), logits_of(expected), atol=1e-5)
    assert weights.keys() == weights_of(expected.model).keys()
    assert (folder / name / "model" / "model.safetensors").is_file()


@pytest.mark.distributed
@pytest.mark.parametrize("kind", CASES)
def test_zero_equals_one_process_and_checkpoints_move_between_engines(
    kind: str, single: tuple[Path, APTTrainer], tmp_path: Path
) -> None:
    """One test, since starting two processes takes longer than the runs in them."""
    (tmp_path / "single").symlink_to(single[0])
    results = [f"{name}.{rank}.json" for name in CASES[kind] for rank in (0, 1)]
    results += [f"{name}.{rank}.txt" for name in ("spoiled", "disagreement") for rank in (0, 1)]
    two_processes(tmp_path, WORKER.replace("KIND", kind), *results)
    for name in CASES[kind]:
        _assert_equals_single(tmp_path, name, single[1])
    straight, resumed = (_result(tmp_path, name, 0) for name in ("straight", "again"))
    assert straight[0]["losses"] == resumed[0]["losses"] and len(straight[0]["losses"]) == 20
    assert [key for key, value in straight[1].items() if not torch.equal(value, resumed[1][key])] == []
    records = [(r["step"], r["kind"], r["block_params"], r["ranks"]) for r in events_of(tmp_path / "straight")]
    assert records == [(r["step"], r["kind"], r["block_params"], r["ranks"]) for r in events_of(single[0])]

    for step in SAVED:  # and back to one process
        source = tmp_path / "straight" / f"checkpoint-{step}"
        assert {file.suffix for file in source.iterdir() if not file.name.startswith("rng_state")} == {
            ".json",
            ".safetensors",
        }
        back = trained(tmp_path / f"back{step}", (), source, per_device_train_batch_size=GLOBAL_BATCH)
        assert back.pruner.plan == single[1].pruner.plan
        assert torch.allclose(logits_of(back), logits_of(single[1]), atol=1e-5)

    for rank in (0, 1):
        message = (tmp_path / f"disagreement.{rank}.txt").read_text()
        assert message.startswith("step 14: processes disagree on what to prune; rank(s) 1 differ")
        message = (tmp_path / f"spoiled.{rank}.txt").read_text()
        assert message.startswith("The gradient is not finite at step 5; nothing was saved")


@pytest.mark.parametrize(
    ("digests", "expected"),
    [(["a", "a"], []), (["a", "b"], [1]), (["b", "a", "a"], [0]), (["a", "c", "a", "b"], [1, 3])],
)
def test_who_disagrees(digests: list[str], expected: list[int]) -> None:
    assert outliers(digests) == expected


def test_a_model_is_brought_to_the_device_where_it_is_scored_before_training() -> None:
    """Under DeepSpeed the Trainer leaves it on the CPU, whatever the device."""
    model = torch.nn.Linear(2, 2)
    parts = SimpleNamespace(device=torch.device("meta"), wrapped=None)
    ZeroEngine(parts).place_student(model)  # type: ignore[arg-type]
    assert model.weight.device.type == "meta"


def test_values_in_float32_follow_a_cut_and_take_new_entries_from_the_parameter() -> None:
    master = torch.arange(6.0).view(3, 2) + 0.1
    new = torch.full((2, 3), 9.0)
    followed = follow_master(master, [Keep(0, torch.tensor([0, 2])), Grow(1, 1)], new)
    assert torch.equal(followed, torch.tensor([[0.1, 1.1, 9.0], [4.1, 5.1, 9.0]]))
    assert torch.equal(
        follow_master(master, [Grow(0, 1), Keep(0, torch.tensor([1, 3]))], new[:, :2]),
        torch.tensor([[2.1, 3.1], [9.0, 9.0]]),
    )


@pytest.mark.parametrize(
    ("group", "place"), [({"fused": True}, "meta"), ({"fused": None, "capturable": False}, "cpu")]
)
def test_the_count_of_steps_is_where_the_kernels_of_torch_read_it(group: dict[str, Any], place: str) -> None:
    """Fused ones, the default of transformers, on the device of the parameters; a count on the CPU stops a GPU run."""
    counted = step_tensor(3, group, torch.device("meta"))
    assert (counted.device.type, counted.dtype) == (place, torch.float32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"deepspeed": deepspeed_config(0)}, "ZeRO stage 0.*Use stage 1, 2 or 3"),
        ({"deepspeed": with_zero(zero_hpz_partition_size=2)}, "ZeRO-3 with zero_hpz_partition_size"),
        ({"deepspeed": with_zero(zero_quantized_weights=True)}, "ZeRO-3 with zero_quantized_weights"),
        ({"deepspeed": with_zero(zero_quantized_gradients=True)}, "ZeRO-3 with zero_quantized_gradients"),
        ({"deepspeed": with_zero(offload_optimizer={"device": "nvme", "nvme_path": "x"})}, "with offload_optimizer"),
        ({"deepspeed": deepspeed_config(2) | {"optimizer": {"type": "AdamW"}}}, "section 'optimizer'"),
        ({"deepspeed": deepspeed_config(2), "preset": "paper"}, "Use preset: ours"),
        ({"deepspeed": deepspeed_config(2), "fp16": True}, "Use bf16"),
        ({"deepspeed": deepspeed_config(3), **ONLY_WEIGHTS}, "save_only_model.*load_best_model_at_end"),
        ({"deepspeed": deepspeed_config(2)}, "needs a launcher"),
    ],
)
def test_what_an_engine_cannot_do_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        APTConfig(output_dir=str(tmp_path / "run"), **{**DEFAULTS, **changes})
    unset_hf_deepspeed_config()  # or models of later tests would be made under ZeRO-3
    assert not (tmp_path / "run").exists()
