"""Rows of different length, cut into other micro-batches and processes, give the run of one batch: every loss is the
mean over all labels, predictions or tokens of an optimizer step."""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import LABELS, LANGUAGE_MODELS, VOCABULARY, tiny_model
from torch.nn import functional as F
from torch.utils.data import Dataset, Subset
from transformers import PreTrainedModel, Trainer, TrainingArguments, set_seed

from apt_trainer import APTTrainer
from apt_trainer.errors import UserError
from apt_trainer.training.evaluation_loop import plain_trainer
from integration.factories import LENGTH, Rows, config, events_of, losses_of, make_trainer, weights_of
from integration.test_processes import CHANGES, GLOBAL_BATCH, two_processes

PLAIN: dict[str, Any] = {"distillation": "none", "distillation_end": None}
FULL: dict[str, Any] = {"tune": "full", "tune_embeddings": True}
KEPT: dict[str, Any] = {"min_heads": 1, "min_neurons": 4}
"""No sublayer vanishes: which layer stands in for one is chosen by the tokens of each micro-batch."""
ROUNDING = 5e-6
"""Of losses in float32, relative; weights of decoders are compared to 1e-6."""
WITHOUT_GRADIENT = ("key.bias", "qa_outputs.bias")
"""Softmax cancels these, so that their gradient is rounding noise, which Adam scales up."""


class Ragged(Dataset[dict[str, torch.Tensor]]):
    """Texts of 3 to 10 tokens, of which the last 1 to 9 are labels; ``task`` "tokens": a class for some of them."""

    def __init__(self, number: int, task: str = "text") -> None:
        generator = torch.Generator().manual_seed(13)
        ids = torch.randint(4, VOCABULARY, (number, LENGTH), generator=generator)
        lengths = torch.randint(3, LENGTH + 1, (number, 1), generator=generator)
        prompts = (torch.rand(number, 1, generator=generator) * (lengths - 1)).long() + 1
        places = torch.arange(LENGTH)
        self.mask = (places < lengths).long()
        self.ids = torch.where(self.mask.bool(), ids, 1)
        labelled = self.mask.bool() & (places >= prompts)
        self.labels = torch.where(labelled, self.ids % LABELS if task == "tokens" else self.ids, -100)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[row], "attention_mask": self.mask[row], "labels": self.labels[row]}


def tiny_task(name: str) -> tuple[PreTrainedModel, Dataset[Any]]:
    """Model and ragged rows; 92 of them, so that the last batch of each epoch is half as large."""
    if name == "t5":
        return tiny_model("t5", "ForConditionalGeneration"), Rows(92, "target")
    if name == "tokens":
        return tiny_model("bert", "ForTokenClassification"), Ragged(92, "tokens")
    if name == "classes":
        return tiny_model("bert"), Rows(92)
    if name == "several":
        return tiny_model("bert"), Rows(92, "several")
    if name == "answers":
        return tiny_model("llama", "ForQuestionAnswering"), Rows(92, "answers")
    return tiny_model(name, LANGUAGE_MODELS[name]), Ragged(92)


def trained(
    folder: Path, name: str = "llama", size: int = GLOBAL_BATCH, rows: int | None = None, **changes: Any
) -> APTTrainer:
    """A run in micro-batches of ``size``, as many of them as make a batch of 8 together."""
    model, data = tiny_task(name)
    world = int(os.environ.get("WORLD_SIZE", 1))
    options = {"heldout_dataset": Subset(data, range(16)), **changes.pop("options", {})}
    data = data if rows is None else Subset(data, range(rows))
    cut = {"per_device_train_batch_size": size, "gradient_accumulation_steps": GLOBAL_BATCH // size // world}
    trainer = make_trainer(folder, model, data, options, **{**CHANGES, **KEPT, **cut, **changes})
    trainer.train()
    return trainer


def assert_equal(one: APTTrainer, other: APTTrainer, atol: float = 1e-6) -> None:
    losses, others = losses_of(one), losses_of(other)
    assert losses.keys() == others.keys() and len(losses) == CHANGES["max_steps"]
    for step, values in losses.items():
        assert others[step] == pytest.approx(values, rel=ROUNDING, abs=1e-6)
    assert one.pruner.plan == other.pruner.plan and one.pruner.sparsity() >= 0.5
    assert_weights(weights_of(one.model), weights_of(other.model), atol)
    records = [events_of(Path(str(t.args.output_dir)), "prune") for t in (one, other)]
    assert [r["ranks"] for r in records[0]] == [r["ranks"] for r in records[1]] and len(records[0]) == 2


def assert_weights(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], atol: float = 1e-6) -> None:
    assert one.keys() == other.keys()
    named = [name for name in one if not name.endswith(WITHOUT_GRADIENT)]
    gaps = {name: float((one[name] - other[name]).abs().max()) for name in named}
    assert {name: gap for name, gap in gaps.items() if gap > atol} == {}


# ---------------------------------------------------------------------------- accumulation

SMOOTHED = {"label_smoothing_factor": 0.1, "distillation_layer_map": "none"}
WEIGHTED = {"options": {"class_weights": [0.2, 1.0, 3.0]}}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", PLAIN),
    "distilled": ("llama", {}),
    "smoothed": ("llama", SMOOTHED),
    "taylor": ("llama", {"importance": "taylor", "preset_overrides": {"rank_score": "absolute"}}),
    "two_stacks": ("t5", {}),
    "tokens": ("tokens", {}),
    "classes": ("classes", {}),
    "answers": ("answers", {}),
    "weighted": ("classes", WEIGHTED),
    "weighted_tokens": ("tokens", WEIGHTED),
    "several": ("several", WEIGHTED),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The run of a case in whole batches, once for all tests."""

    @functools.cache
    def run(case: str, rows: int | None = None) -> APTTrainer:
        name, changes = CASES[case]
        return trained(tmp_path_factory.mktemp(case), name, rows=rows, **changes)

    return run


@pytest.mark.parametrize(("case", "size"), [*((case, 2) for case in CASES), ("distilled", 1)])
def test_accumulated_ragged_batches_equal_one_batch(case: str, size: int, whole: Any, tmp_path: Path) -> None:
    """Through two events, the coming and going of the transform and the merge of adapters; the last batch is short."""
    name, changes = CASES[case]
    accumulated = trained(tmp_path, name, size, **changes)
    assert_equal(whole(case), accumulated, atol=1e-6 if name == "llama" else 1e-5)
    distils = {step for step, values in losses_of(accumulated).items() if len(values) == 3}
    assert distils == (set() if case == "plain" else set(range(3, 18)))
    for step in distils:
        total, task, distance = losses_of(accumulated)[step]
        mu = accumulated.schedule.mu(step - 1)
        assert total == pytest.approx((1 - mu) * task + mu * distance, rel=ROUNDING)


def test_as_the_stock_trainer(tmp_path: Path) -> None:
    """Full fine-tuning of a model whose loss heeds num_items_in_batch."""
    changes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "max_steps": 14}
    model, data = tiny_task("llama")
    ours = make_trainer(tmp_path / "ours", model, data, target_sparsity=None, **FULL, **PLAIN, **changes)
    ours.train()
    set_seed(3)
    names = ("learning_rate", "warmup_steps", "use_cpu", "report_to", "logging_steps", "disable_tqdm", "seed")
    same = {name: getattr(ours.args, name) for name in (*names, *changes)}
    arguments = TrainingArguments(str(tmp_path / "stock"), save_strategy="no", dataloader_pin_memory=False, **same)
    stock = Trainer(tiny_task("llama")[0], arguments, train_dataset=data)
    stock.train()
    assert stock.model_accepts_loss_kwargs
    losses, others = losses_of(ours), losses_of(stock)
    assert len(losses) == 14
    for step, values in losses.items():
        assert values == pytest.approx(others[step], rel=ROUNDING)
    assert_weights(weights_of(ours.model), weights_of(stock.model))


def test_a_loss_of_the_users_own_is_divided_once(whole: Any, tmp_path: Path) -> None:
    def summed(outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | None = None) -> torch.Tensor:
        logits, targets = outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        number = (targets != -100).sum() if num_items_in_batch is None else num_items_in_batch
        return F.cross_entropy(logits, targets, reduction="sum") / number

    own = trained(tmp_path, size=2, options={"compute_loss_func": summed})
    assert_equal(whole("distilled"), own)


@pytest.mark.parametrize("name", ["llama", "tokens"])
def test_a_micro_batch_without_labels_adds_nothing(name: str, tmp_path: Path) -> None:
    runs = []
    for size in (8, 1):
        model, data = tiny_task(name)
        data.labels[::3] = -100
        changes = {**CHANGES, **KEPT, **PLAIN, "gradient_accumulation_steps": 8 // size}
        runs.append(make_trainer(tmp_path / str(size), model, data, per_device_train_batch_size=size, **changes))
        runs[-1].train()
    assert_equal(*runs)


def test_a_step_without_any_label_is_an_error(tmp_path: Path) -> None:
    model, data = tiny_task("llama")
    data.labels[:] = -100
    trainer = make_trainer(tmp_path, model, data, **PLAIN)
    with pytest.raises(UserError, match="loss is not finite at or before step 1"):
        trainer.train()


def test_logged_parts_are_means_over_steps(tmp_path: Path) -> None:
    """Of four steps each, of which the first and the last do not all have a distance to a teacher."""
    each, fourth = (trained(tmp_path / str(number), size=2, logging_steps=number) for number in (1, 4))
    logs = [{log["step"]: log for log in trainer.state.log_history if "loss" in log} for trainer in (each, fourth)]
    assert list(logs[1]) == [4, 8, 12, 16, 20]
    for step, log in logs[1].items():
        for name in ("loss", "task_loss", "distillation_loss"):
            values = [logs[0][s][name] for s in range(step - 3, step + 1) if name in logs[0][s]]
            assert log[name] == pytest.approx(sum(values) / len(values), rel=ROUNDING), (step, name)


def test_outside_a_step_a_batch_stands_alone(tmp_path: Path) -> None:
    trainer = trained(tmp_path, size=2, **PLAIN)
    batch = torch.utils.data.default_collate([Ragged(92)[row] for row in range(4)])
    in_training = trainer.compute_loss(trainer.model.train(), batch)
    assert in_training.item() == pytest.approx(trainer.model(**batch).loss.item(), rel=ROUNDING)


# ---------------------------------------------------------------------------- two processes

WORKER = """
import json, os, sys
sys.path[:0] = [{root!r}, {tests!r}]
from pathlib import Path
import torch
torch.set_num_threads(1)
from safetensors.torch import save_file
from integration.factories import losses_of, weights_of
from integration.test_micro_batches import CASES, ROWS, WORLDS, evaluated, trained
from integration.test_zero import deepspeed_config

folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
(folder / f"evaluated.{{rank}}.json").write_text(json.dumps(evaluated(folder / "evaluated", 2)))
for name, (case, stage) in WORLDS.items():
    engine = {{"deepspeed": deepspeed_config(stage)}} if stage else {{"ddp_backend": "gloo"}}
    kind, changes = CASES[case]
    trainer = trained(folder / name, kind, size=2, rows=ROWS, **engine, **changes)
    save_file(weights_of(trainer.model), folder / f"{{name}}.{{rank}}.safetensors")
    result = {{"world": trainer.args.world_size, "losses": losses_of(trainer)}}
    (folder / f"{{name}}.{{rank}}.json").write_text(json.dumps(result))
os._exit(0)
"""

ROWS = 88
"""A multiple of the batch: the last batch of two processes would be filled up."""
WORLDS = {"ddp": ("distilled", 0), "zero2": ("distilled", 2), "zero3": ("distilled", 3), "weighted": ("weighted", 0)}
"""Runs of two processes, with two micro-batches each: name → case and stage of ZeRO."""


def evaluated(folder: Path, size: int) -> list[float]:
    """Loss of a classifier on 11 rows, by the trainer of finished models; with and without weights of its labels."""
    options, losses = {"eval_dataset": Rows(11)}, []
    for weights in (None, WEIGHTED["options"]["class_weights"]):
        arguments = config(folder, per_device_eval_batch_size=size)
        trainer = plain_trainer(tiny_model("bert"), arguments, class_weights=weights, **options)
        losses.append(float(trainer.evaluate()["eval_loss"]))
    return losses


@pytest.mark.distributed
def test_two_processes_with_ragged_rows_equal_one(whole: Any, tmp_path: Path) -> None:
    """One test for all entries of ``WORLDS``, since starting two processes takes longer than the rest."""
    results = [f"{name}.{rank}.json" for name in (*WORLDS, "evaluated") for rank in (0, 1)]
    two_processes(tmp_path, WORKER, *results)
    for name, (case, _) in WORLDS.items():
        expected = whole(case, ROWS)
        for rank in (0, 1):
            found = json.loads((tmp_path / f"{name}.{rank}.json").read_text())
            assert found["world"] == 2
            for step, values in losses_of(expected).items():
                assert found["losses"][str(step)] == pytest.approx(values, rel=ROUNDING, abs=1e-6), (name, step)
            found_weights = load_file(tmp_path / f"{name}.{rank}.safetensors")
            assert_weights(weights_of(expected.model), found_weights, 1e-5 if case == "weighted" else 1e-6)
    loss = evaluated(tmp_path / "alone", 4)
    for rank in (0, 1):
        assert json.loads((tmp_path / f"evaluated.{rank}.json").read_text()) == pytest.approx(loss, rel=ROUNDING)
