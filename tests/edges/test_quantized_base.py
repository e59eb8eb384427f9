"""``base_quantization``: cut and refitted in the model's own type, then quantised for adapters to train on."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from integration.factories import DEFAULTS, Rows, SaveAt, events_of, losses_of, make_trainer
from integration.test_processes import two_processes
from safetensors.torch import load_file
from tiny import tiny_model
from torch import nn
from transformers import PreTrainedModel, TrainerCallback

from apt_trainer import APTConfig, APTTrainer, UserError, load_pruned
from apt_trainer.runs.dry_run import base_bytes

BEFORE: dict[str, Any] = {
    "pruning_time": "before",
    "pruning_start": None,
    "pruning_end": 8,
    "num_pruning_events": 2,
    "distillation": "model",
    "teacher_name_or_path": "given",
    "distillation_end": 10,
    "max_steps": 12,
    "calibration_samples": 24,
    "prune_targets": ["neurons"],
    "round_to": 64,
    "target_sparsity": 0.3,
    "lora_target_modules": ["q_proj", "v_proj", "up_proj"],
}


def wide(dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A decoder whose widths are multiples of 64, cut or not: the library computes others wrongly on some CPUs."""
    sizes = {"hidden_size": 64, "intermediate_size": 192, "head_dim": 16, "num_attention_heads": 4}
    return tiny_model("llama", "ForCausalLM", 2, num_key_value_heads=4, attention_bias=True, **sizes).to(dtype)


def before(
    folder: Path,
    form: str | None,
    look: Callable[[Any], None] | None = None,
    saved: tuple[int, ...] = (),
    **changes: Any,
) -> APTTrainer:
    """Of a run that a model teaches; ``look`` sees the student when its first step begins."""
    callbacks = ([SaveAt(saved)] if saved else []) + ([AtFirst(look)] if look is not None else [])
    options = {"teacher": wide(), "callbacks": callbacks, "eval_dataset": Rows(16, "text")}
    model = wide(changes.pop("dtype", torch.float32))
    return make_trainer(
        folder, model, Rows(64, "text", padded=False), options, **{**BEFORE, "base_quantization": form, **changes}
    )


class AtFirst(TrainerCallback):
    def __init__(self, look: Callable[[Any], None]) -> None:
        self.look = look

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step == 0:
            self.look(model.train())


@torch.no_grad()
def logits_of(model: Any) -> torch.Tensor:
    return model(input_ids=Rows(8, padded=False).ids).logits.clone()  # type: ignore[no-any-return]


def base_layers(model: nn.Module) -> dict[str, Any]:
    """Linear layers of the blocks by the path that they have without adapters."""
    linear = {path: module for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    return {
        path.removesuffix(".base_layer"): module
        for path, module in linear.items()
        if path.startswith("model.layers.") and ".lora_" not in path
    }


def values_of(layer: Any) -> torch.Tensor:
    """What the library reads in its own layer."""
    if isinstance(layer, bnb.nn.Linear4bit):
        return bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)  # type: ignore[no-any-return]
    return layer.weight.data.float() * layer.weight.SCB[:, None] / 127  # type: ignore[no-any-return]


def by_hand(plain: nn.Linear, form: str) -> nn.Module:
    """What the library makes of a layer."""
    sizes, weight = (plain.in_features, plain.out_features), plain.weight.detach().clone()
    layer: Any
    if form == "nf4":
        layer = bnb.nn.LinearNF4(*sizes, bias=plain.bias is not None)
        layer.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4")
    else:
        layer = bnb.nn.Linear8bitLt(*sizes, bias=plain.bias is not None, has_fp16_weights=False)
        layer.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    layer.bias = plain.bias
    return layer.to("cpu").train()  # type: ignore[no-any-return]


class Enough(Exception):
    pass


@pytest.mark.parametrize(("form", "share"), [("nf4", 0.27), ("int8", 0.55)])
def test_the_base_is_that_of_the_library_and_the_run_goes_on_from_a_checkpoint(
    form: str, share: float, tmp_path: Path
) -> None:
    seen: dict[str, Any] = {}

    def look(model: Any) -> None:
        seen["logits"] = logits_of(model)
        seen["layers"] = {path: (type(layer), values_of(layer)) for path, layer in base_layers(model).items()}

    straight = before(tmp_path / "straight", form, look, saved=(6, 12))
    straight.train()
    kind = bnb.nn.Linear4bit if form == "nf4" else bnb.nn.Linear8bitLt
    assert len(seen["layers"]) == 2 * 7 and all(issubclass(of, kind) for of, _ in seen["layers"].values())
    records = events_of(tmp_path / "straight")
    assert [(record["step"], record["kind"]) for record in records] == [(0, "prune"), (4, "grow"), (8, "grow")]
    base = records[0]["frozen_base"]
    in_bfloat16 = 2 * sum(values.numel() for _, values in seen["layers"].values())
    assert base["layers"] == 14 and base["bytes_before"] == 2 * in_bfloat16
    assert base["bytes"] <= share * in_bfloat16
    planned = base_bytes(straight.pruner, straight.pruner.plan, form)
    assert planned[0] == base["bytes_before"] and planned[1] == pytest.approx(base["bytes"], rel=0.07)

    # by hand: the same cut, then the library's own layers
    def quantize(model: Any) -> None:
        for path, plain in base_layers(model).items():
            parent = model.get_submodule(path)
            if plain is parent:
                model.set_submodule(path, by_hand(plain, form))
            else:
                parent.base_layer = by_hand(plain, form)
        seen["by hand"] = logits_of(model)
        raise Enough

    with pytest.raises(Enough):
        before(tmp_path / "plain", None, quantize).train()
    assert torch.equal(seen["logits"], seen["by hand"])

    # the finished model: what was read in the base, and the adapters of the last step
    kept = load_file(tmp_path / "straight" / "checkpoint-12" / "apt_training.safetensors")
    for path, (_, values) in seen["layers"].items():
        a, b = (kept.get(f"{path}.lora_{side}.default.weight") for side in "AB")
        merged = values if a is None else values + 2 * (b @ a)
        assert torch.allclose(straight.model.get_submodule(path).weight, merged, atol=1e-6)
        assert type(straight.model.get_submodule(path)) is nn.Linear
    straight.save_model(str(tmp_path / "model"))
    assert torch.equal(logits_of(load_pruned(tmp_path / "model")), logits_of(straight.model.eval()))

    resumed = before(tmp_path / "resumed", form)
    resumed.train(resume_from_checkpoint=str(tmp_path / "straight" / "checkpoint-6"))
    assert losses_of(resumed)[12] == losses_of(straight)[12] and len(losses_of(resumed)[8]) == 3
    pairs = zip(resumed.model.parameters(), straight.model.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


def test_the_best_checkpoint_is_merged_and_adapters_are_kept(tmp_path: Path) -> None:
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}
    steps = {"eval_strategy": "steps", "eval_steps": 4, "save_strategy": "steps", "save_steps": 4}
    further: dict[str, Any] = {"learning_rate": 1e-2, "keep_adapters": True, "dtype": torch.bfloat16}
    trainer = before(tmp_path, "nf4", **best, **steps, **further)
    trainer.train()
    folder = Path(str(trainer.state.best_model_checkpoint))
    assert folder.name != "checkpoint-12"  # of the greatest loss, so that it is another than the last
    kept = load_file(folder / "apt_training.safetensors")
    path = "model.layers.1.mlp.up_proj"
    names = ("weight", "weight.absmax", "weight.quant_map", "weight.nested_absmax", "weight.nested_quant_map")
    names = (*names, "weight.quant_state.bitsandbytes__nf4")
    stored = {name: kept[f"{path}.base_layer.{name}"] for name in names}
    weight = bnb.nn.Params4bit.from_prequantized(stored.pop("weight"), stored, device="cpu")
    a, b = (kept[f"{path}.lora_{side}.default.weight"] for side in "AB")
    values = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
    assert values.dtype == torch.bfloat16
    assert torch.equal(trainer.model.get_submodule(path).weight, values + (2 * (b @ a)).bfloat16())
    trainer.save_model(str(tmp_path / "model"))
    assert torch.equal(load_file(tmp_path / "model" / "apt_adapters.safetensors")[f"{path}.A"], a)


# ---------------------------------------------------------------------------- several processes


WORKER = """
import os, sys
sys.path[:0] = [{root!r}, {tests!r}]
from pathlib import Path
import torch
torch.set_num_threads(1)
from accelerate.state import AcceleratorState
from safetensors.torch import save_file
from apt_trainer import UserError
from edges.test_quantized_base import SHORTER, WORLD, before
from integration.factories import weights_of
from integration.test_zero import deepspeed_config

folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
for name, stage in WORLD.items():
    AcceleratorState._reset_state(True)
    zero = {{}} if stage is None else {{"deepspeed": deepspeed_config(stage)}}
    trainer = before(folder / name, "nf4", per_device_train_batch_size=4, **SHORTER, **zero)
    trainer.train()
    save_file(weights_of(trainer.model), folder / f"{{name}}.{{rank}}.safetensors")
AcceleratorState._reset_state(True)
try:
    before(folder / "refused", "nf4", deepspeed=deepspeed_config(3))
except UserError as error:
    (folder / f"refused.{{rank}}").write_text(str(error))
"""
WORLD = {"ddp": None, "zero2": 2}
SHORTER = {"max_steps": 6, "pruning_end": 4, "distillation_end": 5}


@pytest.mark.distributed
def test_two_processes_train_as_one(tmp_path: Path) -> None:
    two_processes(tmp_path, WORKER, "refused.0", "refused.1")
    assert "does not go with ZeRO-3" in (tmp_path / "refused.1").read_text()
    alone = before(tmp_path / "alone", "nf4", **SHORTER)
    alone.train()
    for name in WORLD:
        one, other = (load_file(tmp_path / f"{name}.{rank}.safetensors") for rank in range(2))
        for path, weight in alone.model.named_parameters():
            assert torch.equal(one[path], other[path])
            assert torch.allclose(one[path], weight, atol=1e-4), path


# ---------------------------------------------------------------------------- what is refused, what is said


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"pruning_time": "early"},
            "base_quantization: nf4 quantises what a cut before training leaves",
        ),
        ({"target_sparsity": None}, "no later cut can follow. Set pruning_time: before and a target_sparsity"),
        ({"tune": "full"}, "base_quantization: nf4 freezes the weights that tune: full trains"),
        ({"tune_after_pruning": "full"}, "freezes the weights that tune: full trains"),
        ({"base_quantization": "nf3"}, "base_quantization='nf3' is not known. Choose one of: nf4, int8"),
        ({"fsdp": "full_shard", "fsdp_config": {"fsdp_version": 2}}, "does not go with FSDP2"),
    ],
)
def test_what_cannot_work_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    given = {**DEFAULTS, **BEFORE, "base_quantization": "nf4", **changes}
    with pytest.raises(UserError, match=message):
        APTConfig(str(tmp_path), **given)


def test_without_the_library_nothing_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else found(name))
    with pytest.raises(
        UserError, match=r"base_quantization: nf4 needs .*bitsandbytes.*pip install 'apt-trainer\[quant"
    ):
        before(tmp_path, "nf4")
