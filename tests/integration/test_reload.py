"""What a run saves loads again with equal logits, and fails loudly where it cannot."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import warm
from tiny import FAMILY_NAMES, TASKS, logits, tiny_batch, tiny_model
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel

import apt_trainer
from apt_trainer import APTTrainer, UserError, load_pruned
from apt_trainer.errors import RunError
from apt_trainer.measure import example_inputs
from apt_trainer.plan.pruning_plan import PruningPlan
from apt_trainer.store.saving import reload_difference
from integration.factories import SHORT, Fixed, Rows, make_trainer, target_of

DATA = {
    "ForSequenceClassification": "classification",
    "ForTokenClassification": "tokens",
    "ForQuestionAnswering": "answers",
}
GONE: dict[str, Any] = {"layers.1.heads": 0.0, "layers.0.neurons": 0.0, "layers.2.heads": [1.0, 0.0, 1.0, 0.0]}
GONE["hidden"] = [0.0] * 4 + [1.0] * 12
ROOT = Path(apt_trainer.__file__).parents[1]


def _trained(folder: Path, family: str = "bert", task: str = "ForSequenceClassification") -> APTTrainer:
    """A short run after which an attention and a feed-forward are gone, and some heads and hidden dimensions."""
    model = tiny_model(family, task)
    left = {"layers.1.heads": 0, "layers.0.neurons": 0, "layers.2.heads": 2, "hidden": 12}
    changes: dict[str, Any] = {**SHORT, "mask_window": 0, "round_to": 1, "target_sparsity": target_of(model, left)}
    trainer = make_trainer(folder, model, Rows(60, DATA[task]), {"importance": Fixed(GONE)}, **changes)
    trainer.train()
    assert trainer.pruner.plan.counts == {**trainer.pruner.dense_plan.counts, **left}
    trainer.model.eval()
    return trainer


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PreTrainedModel]:
    folder = tmp_path_factory.mktemp("saved")
    trainer = _trained(folder)
    trainer.save_model(str(folder / "model"))
    return folder / "model", trainer.model


@pytest.fixture
def copied(saved: tuple[Path, PreTrainedModel], tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved[0], tmp_path / "copy"))


@pytest.mark.parametrize("task", DATA)
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_every_family_and_head_loads_with_equal_logits(tmp_path: Path, family: str, task: str) -> None:
    trainer = _trained(tmp_path, family, task)
    batch = {name: value for name, value in tiny_batch(trainer.model).items() if "label" not in name}
    expected = logits(trainer.model, batch)
    trainer.save_model(str(tmp_path / "ours"))
    trainer.model.save_pretrained(tmp_path / "plain")
    for folder in (tmp_path / "ours", tmp_path / "plain"):
        assert torch.equal(logits(load_pruned(folder).eval(), batch), expected)
        again, info = TASKS[task].from_pretrained(folder, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
        assert torch.equal(logits(again.eval(), batch), expected)
        assert type(again) is type(trainer.model)
        assert sum(p.numel() for p in again.parameters()) == sum(p.numel() for p in trainer.model.parameters())


def test_the_plan_lies_beside_the_model(saved: tuple[Path, PreTrainedModel]) -> None:
    folder, model = saved
    plan = PruningPlan.from_json(json.loads((folder / "pruning_plan.json").read_text()))
    assert plan.kept["hidden"] == tuple(range(4, 16))
    assert model.bert.embeddings.word_embeddings.weight.shape[1] == 12
    assert plan.kept["layers.2.heads"] == (0, 2)
    assert model.bert.encoder.layer[2].attention.self.num_attention_heads == 2


def test_saving_again_after_loading_keeps_everything(copied: Path, tmp_path: Path) -> None:
    first = load_pruned(copied).eval()
    first.save_pretrained(tmp_path / "second")
    second = load_pruned(tmp_path / "second").eval()
    batch = tiny_batch(first)
    assert torch.equal(logits(first, batch), logits(second, batch))
    assert first.config.apt_structure == second.config.apt_structure


def test_a_loaded_model_can_be_trained_and_its_base_model_taken(copied: Path) -> None:
    model = load_pruned(copied).train()
    model(**tiny_batch(model)).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    config = AutoConfig.from_pretrained(copied)
    assert (config.model_type, config.apt_base_model_type) == ("bert", "bert")
    assert json.loads((copied / "config.json").read_text())["model_type"] == "apt_bert"


PLAIN = """
import sys, torch
from transformers import AutoModelForSequenceClassification
try:
    AutoModelForSequenceClassification.from_pretrained(sys.argv[1])
except ValueError as error:
    print(type(error).__name__, str(error).replace(chr(10), " "))
else:
    raise SystemExit("loaded without apt_trainer")
assert "apt_trainer" not in sys.modules
import apt_trainer
model = AutoModelForSequenceClassification.from_pretrained(sys.argv[1]).eval()
torch.save(model(input_ids=torch.arange(4, 12)[None]).logits.detach(), sys.argv[2])
"""


def test_a_process_without_this_package_fails_loudly_and_with_it_loads(copied: Path, tmp_path: Path) -> None:
    result = subprocess.run(
        [warm.python(warm.LIBRARIES), "-c", PLAIN, str(copied), str(tmp_path / "logits.pt")],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert result.returncode == 0, result.stderr
    assert "ValueError" in result.stdout and "trust_remote_code=True" in result.stdout
    expected = load_pruned(copied).eval()(input_ids=torch.arange(4, 12)[None]).logits
    assert torch.equal(torch.load(tmp_path / "logits.pt"), expected)


def test_bfloat16(copied: Path) -> None:
    exact, rounded = load_pruned(copied).eval(), load_pruned(copied, dtype=torch.bfloat16).eval()
    assert {p.dtype for p in rounded.parameters()} == {torch.bfloat16}
    batch = tiny_batch(exact)
    expected, got = logits(exact, batch), logits(rounded, batch)
    assert got.dtype == torch.bfloat16
    assert (got.float() - expected).abs().max() < 0.05 * expected.abs().max()
    for name, parameter in rounded.named_parameters():
        assert torch.equal(parameter, exact.get_parameter(name).to(torch.bfloat16))


# ---------------------------------------------------------------------------- damage


@pytest.mark.parametrize("left", [0.5, 0.999, 0.0])
def test_truncated_weights_are_reported(copied: Path, left: float) -> None:
    file = copied / "model.safetensors"
    file.write_bytes(file.read_bytes()[: int(left * file.stat().st_size)])
    with pytest.raises(UserError, match="damaged or incomplete"):
        load_pruned(copied)


def test_weights_that_are_missing_are_reported(copied: Path) -> None:
    (copied / "model.safetensors").unlink()
    with pytest.raises(UserError, match="damaged or incomplete"):
        load_pruned(copied)


def test_a_weight_that_is_missing_is_reported(copied: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(copied / "model.safetensors")
    tensors.pop("classifier.weight")
    save_file(tensors, copied / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="1 missing keys"):
        load_pruned(copied)


def test_a_structure_that_does_not_fit_its_weights_is_reported(copied: Path) -> None:
    config = json.loads((copied / "config.json").read_text())
    name = "bert.encoder.layer.1.intermediate.dense.bias"
    config["apt_structure"]["parameters"][name] = [3]
    (copied / "config.json").write_text(json.dumps(config))
    with pytest.raises((UserError, RuntimeError), match="mismatch"):
        load_pruned(copied)


def test_a_later_format_is_refused(copied: Path) -> None:
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps(config | {"apt_format_version": 99}))
    with pytest.raises(UserError, match="format 99"):
        load_pruned(copied)


def test_folders_without_a_pruned_model_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no config\.json"):
        load_pruned(tmp_path)
    tiny_model("bert").save_pretrained(tmp_path)
    with pytest.raises(UserError, match="stock model"):
        load_pruned(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_full_disk_leaves_the_older_model_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    trainer = _trained(tmp_path)
    target = tmp_path / "model"
    trainer.save_model(str(target))
    batch = tiny_batch(trainer.model)
    expected = logits(trainer.model, batch)
    replace = os.replace

    def full(source: Any, destination: Any) -> None:
        if Path(source).parent.name.startswith(".saving-") and Path(destination) == target / name:
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(source, destination)

    with torch.no_grad():
        trainer.model.classifier.weight.mul_(3)
    monkeypatch.setattr("apt_trainer.store.saving.os.replace", full)
    with pytest.raises(RunError, match="No space left") as failed:
        trainer.save_model(str(target))
    monkeypatch.undo()
    assert torch.equal(logits(load_pruned(target).eval(), batch), expected)
    (rescued,) = target.glob("rescued-*")
    assert str(rescued) in str(failed.value)
    assert torch.equal(logits(load_pruned(rescued).eval(), batch), logits(trainer.model, batch))
    others = {"README.md", "config.json", "model.safetensors", "modeling_apt.py", "pruning_plan.json"}
    assert {file.name for file in target.iterdir()} == {*others, rescued.name}
    trainer.save_model(str(target))
    assert torch.equal(logits(load_pruned(target).eval(), batch), logits(trainer.model, batch))


def test_a_save_that_does_not_reload_is_an_error(saved: tuple[Path, PreTrainedModel], copied: Path) -> None:
    model = load_pruned(copied)
    assert reload_difference(model, copied) == 0.0
    with torch.no_grad():
        model.classifier.bias.add_(1.0)
    with pytest.raises(RuntimeError, match="other logits"):
        reload_difference(model, copied)


@pytest.mark.parametrize("pruned", [True, False])
def test_a_save_is_compared_by_the_attention_that_was_trained(copied: Path, tmp_path: Path, pruned: bool) -> None:
    """In bfloat16 another back end gives other logits."""
    if not pruned:
        copied = tmp_path / "stock"
        tiny_model("bert").save_pretrained(copied)
    load = load_pruned if pruned else AutoModelForSequenceClassification.from_pretrained
    models = {name: load(copied, dtype=torch.bfloat16, attn_implementation=name).eval() for name in ("eager", "sdpa")}
    batch = example_inputs(models["eager"], 1, 16)
    assert not torch.equal(*(logits(model, batch) for model in models.values()))
    for model in models.values():
        assert reload_difference(model, copied) == 0.0


def test_a_stock_loader_of_this_process_builds_the_small_model(saved: tuple[Path, PreTrainedModel]) -> None:
    again = AutoModelForSequenceClassification.from_pretrained(saved[0])
    dense = sum(p.numel() for p in tiny_model("bert").parameters())
    assert sum(p.numel() for p in again.parameters()) < 0.75 * dense
