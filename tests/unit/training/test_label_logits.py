"""Losses from the logits where labels are: equal to those of all logits, and never as large."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from integration.factories import SHORT, Rows, losses_of, make_trainer, weights_of
from tiny import LANGUAGE_MODELS, VOCABULARY, adapted, tiny_batch, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode

from apt_trainer import APTTrainer
from apt_trainer.distillation.losses import prediction_loss
from apt_trainer.training import label_logits
from apt_trainer.training.label_logits import LabelLogits, LabelPositions, find_logits

CAUSAL = tuple(name for name, task in LANGUAGE_MODELS.items() if task == "ForCausalLM")
SPECIAL: dict[str, dict[str, Any]] = {"gemma2": {"final_logit_softcapping": 2.0}}


def _batch(model: Any) -> dict[str, torch.Tensor]:
    """Labels at some positions: after a prompt, none in the last row."""
    batch = tiny_batch(model)
    batch["labels"] = batch["labels"].clone()
    batch["labels"][:, :3] = -100
    batch["labels"][-1] = -100
    return batch


@pytest.mark.parametrize("name", CAUSAL)
def test_logits_of_hidden_states_are_those_of_the_model(name: str) -> None:
    model = tiny_model(name, "ForCausalLM", **SPECIAL.get(name, {}))
    found = find_logits(model)
    assert found is not None and "_loss_function" not in model.__dict__
    heard: list[torch.Tensor] = []
    found.head.register_forward_pre_hook(lambda module, args: heard.append(args[0]))
    batch = tiny_batch(model)
    with torch.no_grad():
        expected = model(**batch).logits
        torch.testing.assert_close(found(heard[0]), expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", CAUSAL)
@pytest.mark.parametrize("elements", [2**26, 3 * VOCABULARY], ids=["at once", "chunks"])
@pytest.mark.parametrize("items", [None, 5], ids=["mean", "sum"])
@pytest.mark.parametrize("trained", [False, True], ids=["frozen head", "trained head"])
def test_losses_and_gradients_equal_those_of_all_logits(
    name: str, elements: int, items: int | None, trained: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(label_logits, "ELEMENTS", elements)
    model, teacher = (adapted(tiny_model(name, "ForCausalLM", **SPECIAL.get(name, {}))) for _ in range(2))
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.mul_(1.1)
    model.get_output_embeddings().weight.requires_grad_(trained)
    batch = _batch(model)
    counts = {} if items is None else {"num_items_in_batch": torch.tensor(items)}

    outputs = model(**batch, **counts)
    counted = torch.zeros_like(batch["labels"])
    counted[:, :-1] = batch["labels"][:, 1:] != -100
    with torch.no_grad():
        taught = teacher(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    distance = prediction_loss(outputs, taught, 2.0, counted)
    expected = _gradients(model, 0.3 * outputs.loss + 0.7 * distance)

    found = find_logits(model)
    assert found is not None
    positions = LabelPositions(batch["labels"], found, find_logits(teacher), 2.0)
    with positions.of_teacher(), torch.no_grad():
        teacher(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    with positions.of_student(model):
        ours = model(**batch, **counts)
    assert positions.distance is not None
    torch.testing.assert_close(ours.loss, outputs.loss, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(positions.distance, distance, rtol=1e-6, atol=1e-6)
    got = _gradients(model, 0.3 * ours.loss + 0.7 * positions.distance)
    assert got.keys() == expected.keys() and len(got) > 0
    for key, gradient in expected.items():
        torch.testing.assert_close(
            got[key], gradient, rtol=1e-5, atol=1e-6, msg=lambda text, key=key: f"{key}: {text}"
        )


def _gradients(model: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("elements", [2**26, 3 * VOCABULARY], ids=["at once", "chunks"])
def test_a_batch_without_labels_has_no_mean_and_no_gradient(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(label_logits, "ELEMENTS", elements)
    model = adapted(tiny_model("llama", "ForCausalLM"))
    batch = tiny_batch(model) | {"labels": torch.full((4, 7), -100)}
    found = find_logits(model)
    assert found is not None
    positions = LabelPositions(batch["labels"], found)
    with positions.of_student(model):
        loss = model(**batch).loss
    assert torch.isnan(loss) and torch.isnan(model(**batch).loss)
    gradients = _gradients(model, torch.where(torch.tensor(True), 0.0, loss))
    assert all(torch.equal(gradient, torch.zeros_like(gradient)) for gradient in gradients.values())


def test_a_model_that_changes_its_logits_otherwise_keeps_its_own_way() -> None:
    model = tiny_model("llama", "ForCausalLM")
    own = model.forward

    def changed(*args: Any, **kwargs: Any) -> Any:
        function = model.loss_function
        model._loss_function = lambda logits, **others: function(logits=logits + logits.sign(), **others)
        try:
            return own(*args, **kwargs)
        finally:
            model._loss_function = function

    model.forward = changed
    assert find_logits(model) is None


class _Largest(TorchDispatchMode):
    """``seen``: the most positions that a matrix product or a softmax made logits of."""

    seen = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        makes = func in (torch.ops.aten.mm.default, torch.ops.aten._log_softmax.default)
        if makes and result.shape[-1] == VOCABULARY:
            self.seen = max(self.seen, result.numel() // VOCABULARY)
        return result  # type: ignore[no-any-return]


def test_no_more_positions_than_a_chunk_have_logits_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(label_logits, "ELEMENTS", 3 * VOCABULARY)
    model = adapted(tiny_model("llama", "ForCausalLM"))
    batch, found = _batch(model), find_logits(model)
    assert found is not None
    for within, most in ((False, batch["labels"].numel()), (True, 3)):
        positions = LabelPositions(batch["labels"], found)
        with _Largest() as largest:
            if within:
                with positions.of_student(model):
                    model(**batch).loss.backward()
            else:
                model(**batch).loss.backward()
        assert largest.seen == most


def _run(folder: Path, change: Callable[[APTTrainer], None] = lambda trainer: None, **changes: Any) -> APTTrainer:
    options = changes.pop("options", {})
    model = tiny_model(changes.pop("name", "llama"), "ForCausalLM", dropout=0.1)
    settings = {**SHORT, "round_to": 1, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 4, **changes}
    trainer = make_trainer(folder, model, Rows(60, "text"), options, **settings)
    change(trainer)
    trainer.train()
    return trainer


@pytest.mark.parametrize("early", [True, False], ids=["while training", "before"])
def test_a_run_takes_the_same_steps(early: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(label_logits, "ELEMENTS", 5 * VOCABULARY)
    used: list[bool] = []
    possible = LabelLogits._possible

    def noted(self: LabelLogits, inputs: Any) -> bool:
        used.append(possible(self, inputs))
        return used[-1]

    monkeypatch.setattr(LabelLogits, "_possible", noted)
    before = {"pruning_time": "before", "pruning_start": None, "distillation": "none"}
    changes = {} if early else before | {"target_sparsity": 0.3, "mask_window": None, "distillation_end": None}
    ours = _run(tmp_path / "ours", **changes)
    assert any(used) and (all(used) or early)
    monkeypatch.setattr(LabelLogits, "_possible", lambda self, inputs: False)
    whole = _run(tmp_path / "whole", **changes)
    for step, losses in losses_of(whole).items():
        assert losses_of(ours)[step] == pytest.approx(losses, rel=1e-4, abs=1e-5)
    expected, got = weights_of(whole.model), weights_of(ours.model)
    assert expected.keys() == got.keys()
    for key, weight in expected.items():
        torch.testing.assert_close(got[key], weight, rtol=1e-3, atol=1e-4)


def test_losses_that_read_logits_get_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: Any) -> None:
        raise AssertionError("positions were chosen")

    monkeypatch.setattr(label_logits, "LabelPositions", never)
    dense = {"max_steps": 2, "target_sparsity": None, "distillation": "none", "distillation_end": None}
    assert _run(tmp_path / "smoothed", **dense, label_smoothing_factor=0.1).state.global_step == 2

    def loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        assert outputs.logits.shape[:2] == labels.shape
        return outputs.logits[:, :-1].float().logsumexp(-1).mean()

    assert _run(tmp_path / "own", **dense, options={"compute_loss_func": loss}).state.global_step == 2
