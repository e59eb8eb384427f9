"""What a micro-batch counts among those of its step: labels, predictions and real tokens, over all processes."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import LANGUAGE_MODELS, tiny_batch, tiny_model

from apt_trainer.errors import UserError
from apt_trainer.models import family_of
from apt_trainer.models.shares import Shares, count
from apt_trainer.training.step_losses import StepLosses

Inputs = dict[str, Any]


def counted(model: torch.nn.Module, inputs: Mapping[str, Any]) -> list[int]:
    return count(inputs, family_of(model.config), model).tolist()  # type: ignore[no-any-return]


# Rows of ``tiny_batch`` have 7, 6, 5 and 4 real tokens.


def test_a_causal_model_counts_labels_that_are_predicted() -> None:
    model = tiny_model("llama", "ForCausalLM")
    batch = tiny_batch(model)
    assert counted(model, batch) == [22 - 4, 22 - 4, 22]  # nothing predicts the first token of a row
    batch["labels"][0, :3] = -100  # a prompt
    assert counted(model, batch) == [22 - 4 - 2, 22 - 4 - 2, 22]


@pytest.mark.parametrize("task", ["ForTokenClassification", "ForMaskedLM"])
def test_labels_may_be_fewer_than_predictions(task: str) -> None:
    model = tiny_model("bert", task)
    batch = tiny_batch(model)
    batch["labels"][:, ::2] = -100
    labels = int((batch["labels"] != -100).sum())
    assert 0 < labels < 22 and counted(model, batch) == [labels, 22, 22]


def test_each_stack_counts_its_own_tokens() -> None:
    model = tiny_model("t5", "ForConditionalGeneration")
    batch = tiny_batch(model)
    labels = int((batch["labels"] != -100).sum())
    assert labels < batch["labels"].numel() and counted(model, batch) == [labels, labels, 22, labels]
    unlabelled = {name: value for name, value in batch.items() if name != "labels"}
    assert counted(model, unlabelled | {"decoder_attention_mask": torch.ones(4, 2)}) == [4, 4, 22, 8]
    unmasked = {"input_ids": batch["input_ids"], "decoder_input_ids": torch.ones(4, 3, dtype=torch.long)}
    assert counted(model, unmasked) == [4, 4, 28, 12]


@pytest.mark.parametrize("task", ["ForSequenceClassification", "ForQuestionAnswering"])
def test_one_label_per_row(task: str) -> None:
    model = tiny_model("bert", task)
    assert counted(model, tiny_batch(model)) == [4, 4, 22]


def test_several_labels_per_row_weigh_as_rows_do() -> None:
    model = tiny_model("bert")
    several = tiny_batch(model) | {"labels": torch.rand(4, 3)}
    assert counted(model, several) == [12, 4, 22]


@pytest.mark.parametrize("name", ["ids", "embeddings"])
def test_without_a_mask_all_tokens_count(name: str) -> None:
    model = tiny_model("llama", "ForCausalLM")
    batch = tiny_batch(model, padded=False)
    inputs = {"input_ids": batch["input_ids"]} if name == "ids" else {"inputs_embeds": torch.rand(4, 7, 16)}
    assert counted(model, inputs | {"labels": batch["labels"], "use_cache": False}) == [24, 24, 28]


@pytest.mark.parametrize("family_name", ["llama", "t5"])
def test_weighed_means_of_parts_are_the_mean_of_the_whole(family_name: str) -> None:
    """Of two processes with two micro-batches each: the sum over micro-batches, the mean over processes."""
    model = tiny_model(family_name, LANGUAGE_MODELS[family_name])
    family, batch = family_of(model.config), tiny_batch(model)
    parts = [batch | {name: value[row : row + 1] for name, value in batch.items()} for row in range(4)]
    whole = sum(count(part, family, model) for part in parts)
    assert torch.equal(torch.as_tensor(whole), count(batch, family, model))
    shares = [Shares.of(count(part, family, model), torch.as_tensor(whole), 2, family) for part in parts]
    with torch.no_grad():
        losses = [share.of_task(model(**part).loss) for share, part in zip(shares, parts, strict=True)]
        assert torch.allclose((losses[0] + losses[1] + losses[2] + losses[3]) / 2, model(**batch).loss, rtol=1e-6)
    for name in ("labels", "predictions"):
        assert float(sum(getattr(share, name) for share in shares)) == pytest.approx(2)
    for stack in (table.stack for table in family.stacks):
        assert float(sum(share.tokens[stack] for share in shares)) == pytest.approx(2)


def test_a_whole_step_in_one_batch_weighs_exactly_one() -> None:
    model = tiny_model("t5", "ForConditionalGeneration")
    family = family_of(model.config)
    numbers = count(tiny_batch(model), family, model)
    shares = Shares.of(numbers, numbers, 1, family)
    assert [shares.labels, shares.predictions, *shares.tokens.values()] == [1, 1, 1, 1]


def test_a_mean_over_no_labels_counts_nothing_and_has_no_gradient() -> None:
    family = family_of(tiny_model("bert").config)
    logits = torch.rand(3, 5, requires_grad=True)
    nothing = torch.nn.functional.cross_entropy(logits, torch.full((3,), -100))
    assert torch.isnan(nothing)
    loss = Shares.of(torch.tensor([0, 3, 3]), torch.tensor([6, 6, 6]), 1, family).of_task(nothing)
    loss.backward()
    assert loss == 0 and torch.equal(logits.grad, torch.zeros(3, 5))
    assert torch.isnan(Shares.of(torch.tensor([0, 3, 3]), torch.tensor([0, 6, 6]), 1, family).of_task(nothing))


# ---------------------------------------------------------------------------- losses of steps


class TwoProcesses(SimpleNamespace):
    """An accelerator whose other process has three times as many of everything."""

    device, num_processes = torch.device("cpu"), 2

    def reduce(self, value: torch.Tensor, reduction: str) -> torch.Tensor:
        return 4 * value if reduction == "sum" else value


@pytest.mark.parametrize("together", [True, False])
def test_micro_batches_are_weighed_within_their_step(together: bool) -> None:
    model = tiny_model("llama", "ForCausalLM")
    batch = tiny_batch(model)
    parts = [{name: value[rows] for name, value in batch.items()} for rows in (slice(0, 1), slice(1, 4))]
    losses = StepLosses(family_of(model.config), TwoProcesses(), together)
    alone = losses.shares(parts[0], model)
    assert [alone.labels, alone.predictions, alone.tokens["decoder"]] == [1, 1, 1]
    losses.begin(parts, model)
    first, second = (losses.shares(part, model) for part in parts)
    share_of_process = 2 / 4 if together else 1.0  # two processes, a quarter of all labels
    assert first.labels.item() == pytest.approx(share_of_process * 6 / 18)
    assert second.labels.item() == pytest.approx(share_of_process * 12 / 18)
    assert first.tokens["decoder"].item() == pytest.approx(share_of_process * 7 / 22)
    losses.end()
    assert losses.shares(parts[0], model).labels == 1


def test_parts_of_a_step_add_up_and_steps_are_averaged() -> None:
    losses = StepLosses(family_of(tiny_model("bert").config), TwoProcesses())
    for step, parts in {1: (1.0, 2.0), 2: (5.0, 4.0)}.items():
        for part in parts:
            losses.note("task", torch.tensor(part), step)
    losses.note("late", torch.tensor(7.0), 2)
    assert losses.means() == {"task": 6.0, "late": 7.0}
    assert losses.means() == {}


def test_one_loss_that_is_not_finite_is_remembered() -> None:
    losses = StepLosses(family_of(tiny_model("bert").config), TwoProcesses())
    losses.look_at(torch.tensor(1.0))
    losses.check_finite(3)
    losses.look_at(torch.tensor(float("inf")))
    losses.look_at(torch.tensor(1.0))
    with pytest.raises(UserError, match="not finite at or before step 4"):
        losses.check_finite(4)
