"""Trainers, optimizers, data and models of the user's own: each works, or is one error at the start."""

from __future__ import annotations

import copy
import functools
import itertools
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from integration.factories import SHORT, Rows, SaveAt, config, events_of, losses_of, weights_of
from integration.test_processes import two_processes
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from tiny import adapted, tiny_model
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, Subset
from transformers import TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_utils import HPSearchBackend

from apt_trainer import APTTrainer, UserError
from apt_trainer.settings.engines import check_launch
from apt_trainer.surgery.slicing import Grow
from apt_trainer.training.engines.base import plain_optimizer
from apt_trainer.training.engines.state import carry
from apt_trainer.training.evaluation_loop import plain_trainer

ACCUMULATED: dict[str, Any] = {**SHORT, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
PLAIN: dict[str, Any] = {"distillation": "none", "distillation_end": None}
HELD = Rows(16)


def run_of(folder: Path, kind: type[APTTrainer] = APTTrainer, options: Any = None, **changes: Any) -> APTTrainer:
    """A trained trainer of class ``kind``."""
    trainer = made(folder, kind, options, **changes)
    trainer.train()
    return trainer


def made(
    folder: Path,
    kind: type[APTTrainer] = APTTrainer,
    options: Any = None,
    model: Any = None,
    data: Any = None,
    **changes: Any,
) -> APTTrainer:
    set_seed(3)
    options = {"heldout_dataset": HELD, **(options or {})}
    given = tiny_model("bert") if model is None and "model_init" not in options else model
    return kind(given, config(folder, **{**SHORT, **changes}), Rows(92) if data is None else data, **options)


def assert_same(one: APTTrainer, other: APTTrainer, exact: bool = True) -> None:
    losses, others = losses_of(one), losses_of(other)
    assert losses.keys() == others.keys()
    for step, values in losses.items():
        assert others[step] == (values if exact else pytest.approx(values, rel=1e-4)), step
    assert one.pruner.plan == other.pruner.plan and one.pruner.sparsity() >= 0.5
    weights, others_weights = weights_of(one.model), weights_of(other.model)
    for name, value in weights.items():
        if exact:
            assert torch.equal(value, others_weights[name]), name
        else:
            assert torch.allclose(value, others_weights[name], atol=1e-4), name


# ---------------------------------------------------------------------------- compute_loss and its kin


class CallsSuper(APTTrainer):
    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)


class LossAlone(APTTrainer):
    """As most tutorials have it: labels taken out, a loss of its own."""

    calls = 0

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        LossAlone.calls += 1
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = F.cross_entropy(outputs.logits, labels)
        return (loss, outputs) if return_outputs else loss


class ByPosition(APTTrainer):
    """Arguments by position, an earlier pass without gradients, a second one with them."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        with torch.no_grad():
            model(inputs["input_ids"][:1])
        outputs = model(inputs["input_ids"], inputs["attention_mask"])
        loss = F.cross_entropy(outputs.logits, inputs["labels"])
        return (loss, outputs) if return_outputs else loss


class OwnStep(APTTrainer):
    """Neither training_step nor get_batch_samples calls super()."""

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
        return list(itertools.islice(epoch_iterator, num_batches)), None

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        model.train()
        inputs = self._prepare_inputs(inputs)
        loss = self.compute_loss(model, inputs)
        inputs.clear()
        self.accelerator.backward(loss)
        return loss.detach()


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> APTTrainer:
    """Four micro-batches a step, a teacher, two events."""
    return run_of(tmp_path_factory.mktemp("stock"), **ACCUMULATED)


@pytest.mark.parametrize("kind", [CallsSuper, LossAlone, ByPosition, OwnStep])
def test_a_subclass_that_overrides_a_step_trains_as_the_trainer(
    kind: type[APTTrainer], stock: APTTrainer, tmp_path: Path
) -> None:
    LossAlone.calls = 0
    trainer = run_of(tmp_path, kind, **ACCUMULATED)
    assert_same(stock, trainer)
    assert {len(values) for step, values in losses_of(trainer).items() if 3 <= step <= 10} == {3}
    if kind is LossAlone:
        assert 12 * 4 < LossAlone.calls < 12 * 4 + 20  # once per micro-batch; then held-out rows and probes


def test_what_a_subclass_adds_to_the_loss_is_trained_on(stock: APTTrainer, tmp_path: Path) -> None:
    class Doubled(APTTrainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            result = super().compute_loss(*args, **kwargs)
            return (2 * result[0], *result[1:]) if isinstance(result, tuple) else 2 * result

    trainer = run_of(tmp_path, Doubled, **ACCUMULATED)
    assert losses_of(trainer)[1][1] == pytest.approx(2 * losses_of(stock)[1][1], rel=1e-6)


def test_a_loss_normalised_by_the_subclass_is_not_weighed_again(tmp_path: Path) -> None:
    class Sums(APTTrainer):
        loss_is_scaled_for_ga = True

        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            outputs = model(**inputs)
            reduction = "mean" if num_items_in_batch is None else "sum"
            loss = F.cross_entropy(outputs.logits, inputs["labels"], reduction=reduction) / (num_items_in_batch or 1)
            return (loss, outputs) if return_outputs else loss

    one, other = (run_of(tmp_path / kind.__name__, kind, **ACCUMULATED) for kind in (Sums, APTTrainer))
    assert_same(one, other, exact=False)


def test_the_teacher_is_given_what_the_subclass_gives_the_student(tmp_path: Path) -> None:
    """A student that sees masked-out tokens learns from a teacher that sees them too."""
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    class Shortened(APTTrainer):
        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            inputs = {
                **inputs,
                "input_ids": inputs["input_ids"][:, :5],
                "attention_mask": inputs["attention_mask"][:, :5],
            }
            outputs = model(**inputs)
            return (outputs.loss, outputs) if return_outputs else outputs.loss

    trainer = made(tmp_path, Shortened)
    teach = trainer.distillation.teach
    trainer.distillation.teach = lambda inputs: (seen.append((inputs["input_ids"], inputs["labels"])), teach(inputs))[
        1
    ]  # type: ignore[method-assign]
    trainer.train()
    assert seen and {ids.shape[1] for ids, _ in seen} == {5}


class NeverTheModel(APTTrainer):
    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        hidden = model.bert(inputs["input_ids"], inputs["attention_mask"])
        loss = F.cross_entropy(model.classifier(hidden.pooler_output), inputs["labels"])
        return (loss, {"logits": hidden.pooler_output}) if return_outputs else loss


class InEvaluationMode(APTTrainer):
    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        training = model.training
        outputs = model.eval()(**inputs)
        model.train(training)
        return (outputs.loss, outputs) if return_outputs else outputs.loss


class Tuples(APTTrainer):
    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        outputs = model(**inputs, return_dict=False)
        return (outputs[0], outputs) if return_outputs else outputs[0]


class WithoutGradient(APTTrainer):
    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            return super().compute_loss(*args, **kwargs)


class Nothing(APTTrainer):
    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        outputs = model(**{name: value for name, value in inputs.items() if name != "labels"})
        return (outputs.loss, outputs) if return_outputs else outputs.loss


class OldSignature(APTTrainer):
    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False) -> Any:  # type: ignore[override]
        return super().compute_loss(model, inputs, return_outputs)


class NoComputeLoss(APTTrainer):
    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        loss = model(**inputs).loss
        self.accelerator.backward(loss)
        return loss.detach()  # type: ignore[no-any-return]


class Divides(OwnStep):
    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        model.train()
        loss = self.compute_loss(model, self._prepare_inputs(inputs)) / self.args.gradient_accumulation_steps
        self.accelerator.backward(loss)
        return loss.detach()  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (NeverTheModel, "does not run the model it is given"),
        (InEvaluationMode, "does not run the model it is given in training mode"),
        (Tuples, "gave tuple in compute_loss of Tuples, but distillation reads outputs by name"),
        (WithoutGradient, "gave a tensor of shape .*, not one number with a gradient"),
        (Nothing, "gave None, not one number"),
        (OldSignature, r"compute_loss of OldSignature cannot be called .*num_items_in_batch=None\)"),
        (NoComputeLoss, "training_step of NoComputeLoss does not call self.compute_loss"),
        (Divides, "training_step of Divides divides the loss by the 4 micro-batches"),
    ],
)
def test_a_subclass_that_would_train_without_the_method_is_refused_before_a_step(
    kind: type[APTTrainer], message: str, tmp_path: Path
) -> None:
    before = weights_of(tiny_model("bert"))
    model = tiny_model("bert")
    with pytest.raises(UserError, match=message):
        made(tmp_path, kind, model=model, **ACCUMULATED).train()
    after = {name.replace(".base_layer", ""): p for name, p in model.named_parameters()}
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_parts_of_the_model_are_enough_where_nothing_is_distilled(tmp_path: Path) -> None:
    """Units are observed in layers, whoever calls them."""
    one, other = (run_of(tmp_path / kind.__name__, kind, **PLAIN) for kind in (NeverTheModel, APTTrainer))
    assert_same(one, other)


def test_a_model_that_no_layer_of_is_run_is_not_pruned_without_scores(tmp_path: Path) -> None:
    class OfACopy(APTTrainer):
        copied: Any = None

        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            self.copied = self.copied or tiny_model("bert")
            outputs = self.copied(**inputs)
            return (outputs.loss, outputs) if return_outputs else outputs.loss

    with pytest.raises(UserError, match="no forward pass of the model's layers was seen"):
        run_of(tmp_path, OfACopy, **PLAIN)


def test_labels_that_held_out_rows_are_not_asked_by_are_an_error_before_a_step(tmp_path: Path) -> None:
    class Renamed(Dataset[Any]):
        def __init__(self) -> None:
            self.rows = Rows(92)

        def __len__(self) -> int:
            return len(self.rows)

        def __getitem__(self, row: int) -> Any:
            found = self.rows[row]
            return {"target": found.pop("labels"), **found}

    class OfTargets(APTTrainer):
        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            return super().compute_loss(model, {**inputs, "labels": inputs.pop("target")}, return_outputs)

    given: dict[str, Any] = {
        "data": Renamed(),
        "options": {"heldout_dataset": Renamed()},
        "remove_unused_columns": False,
    }
    with pytest.raises(UserError, match=r"label_names=\['labels'\] are not all in a batch, which has .*target"):
        made(tmp_path / "without", OfTargets, **given).train()
    trainer = run_of(tmp_path / "named", OfTargets, **given, label_names=["target"])
    assert trainer.pruner.sparsity() >= 0.5 and len(losses_of(trainer)[6]) == 3


def test_a_forward_that_a_copy_would_share_is_refused(tmp_path: Path) -> None:
    def wrapped() -> Any:
        model = tiny_model("bert")
        plain = model.forward

        @functools.wraps(plain)
        def forward(*args: Any, **kwargs: Any) -> Any:
            return plain(*args, **kwargs)

        model.forward = forward
        return model

    with pytest.raises(UserError, match="forward of BertForSequenceClassification is replaced"):
        made(tmp_path, model=wrapped())
    assert run_of(tmp_path / "plain", model=wrapped(), **PLAIN).pruner.sparsity() >= 0.5


def test_a_subclass_scores_and_probes_with_its_own_loss(tmp_path: Path) -> None:
    """Before training too: the loss before the cut is the subclass' own, ten times that of the model."""

    class Tenfold(APTTrainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            result = super().compute_loss(*args, **kwargs)
            return (10 * result[0], *result[1:]) if isinstance(result, tuple) else 10 * result

    before = {**PLAIN, "pruning_time": "before", "pruning_start": None, "calibration_samples": 16}
    for kind in (APTTrainer, Tenfold):
        run_of(tmp_path / kind.__name__, kind, **before)
    one, ten = (events_of(tmp_path / kind.__name__, "prune")[0]["loss_before"] for kind in (APTTrainer, Tenfold))
    assert ten == pytest.approx(10 * one, rel=1e-6)


# ---------------------------------------------------------------------------- optimizers


def test_an_optimizer_or_a_schedule_that_is_made_already_is_refused(tmp_path: Path) -> None:
    model = tiny_model("bert")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    for given in ((optimizer, None), (None, schedule), (optimizer, schedule)):
        with pytest.raises(UserError, match=r"optimizers holds .*(SGD|LambdaLR).*optimizer_cls_and_kwargs"):
            made(tmp_path, options={"optimizers": given}, model=model)


class Held(TrainerCallback):
    """Classes and options of the optimizers of a run, and whether they held all that trains."""

    def __init__(self) -> None:
        self.seen: dict[int, tuple[type, float]] = {}
        self.trainer: Any = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        optimizer = plain_optimizer(self.trainer)
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        assert {id(p) for p in self.trainer.model.parameters() if p.requires_grad} <= held
        self.seen[state.global_step] = type(optimizer), optimizer.param_groups[0]["initial_lr"]


CLASSES: dict[str, tuple[Any, dict[str, Any]]] = {
    "nadam": (torch.optim.NAdam, {"lr": 3e-3, "betas": (0.8, 0.99)}),
    "rmsprop": (torch.optim.RMSprop, {"momentum": 0.5}),
    "amsgrad": (torch.optim.AdamW, {"amsgrad": True, "weight_decay": 0.1}),
}


@pytest.mark.parametrize("name", CLASSES)
def test_a_class_of_optimizers_is_used_throughout_and_resumed(name: str, tmp_path: Path) -> None:
    cls, options = CLASSES[name]
    held = Held()
    given = {"optimizer_cls_and_kwargs": (cls, options), "callbacks": [SaveAt([5, 9])]}
    trainer = made(tmp_path / "straight", options=given)
    held.trainer = trainer
    trainer.add_callback(held)
    trainer.train()
    assert set(held.seen.values()) == {(cls, options.get("lr", 1e-3))} and len(held.seen) == 12
    for step in (5, 9):
        again = made(tmp_path / f"from-{step}", options={"optimizer_cls_and_kwargs": (cls, options)})
        again.train(resume_from_checkpoint=str(tmp_path / "straight" / f"checkpoint-{step}"))
        assert_resumed(trainer, again, step)


def assert_resumed(straight: APTTrainer, resumed: APTTrainer, step: int) -> None:
    expected = {at: values for at, values in losses_of(straight).items() if at > step}
    assert {at: values for at, values in losses_of(resumed).items() if at > step} == expected
    weights = weights_of(resumed.model)
    assert all(torch.equal(value, weights[name]) for name, value in weights_of(straight.model).items())


@pytest.mark.parametrize("key", ["exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum", "exp_inf", "step_size"])
def test_what_updates_are_divided_by_begins_at_its_mean_for_new_entries(key: str) -> None:
    state = {"weight": {key: torch.tensor([[1.0], [3.0]]), "exp_avg": torch.ones(2, 1), "step": torch.tensor(4.0)}}
    carried = carry(state, {"weight": [Grow(1, 2)]})["weight"]
    assert carried[key].tolist() == [[1.0, 2.0, 2.0], [3.0, 2.0, 2.0]]
    assert carried["exp_avg"].tolist() == [[1.0, 0.0, 0.0]] * 2 and carried["step"] == 4


def test_options_of_the_class_come_before_the_settings(tmp_path: Path) -> None:
    given = {"optimizer_cls_and_kwargs": (torch.optim.AdamW, {"lr": 0.5, "weight_decay": 0.25})}
    trainer = made(tmp_path, options=given, full_learning_rate=0.125, tune="full")
    groups = trainer.create_optimizer().param_groups
    assert {(group["lr"], group["weight_decay"]) for group in groups} == {
        (0.125, 0.25),
        (0.125, 0.0),
        (0.5, 0.25),
        (0.5, 0.0),
    }


def test_optimizers_that_cannot_be_made_anew_are_refused(tmp_path: Path) -> None:
    model = tiny_model("bert")
    for given, message in (
        ((torch.optim.AdamW, {"learning_rate": 1e-3}), "cannot be made: .*learning_rate"),
        ((lambda model: None, {}), "no class of optimizers"),
        ((torch.optim.AdamW, {"params": model.parameters()}), "has the option params"),
        ((torch.optim.LBFGS, {}), "LBFGS, which computes the loss itself"),
    ):
        with pytest.raises(UserError, match=message):
            made(tmp_path, options={"optimizer_cls_and_kwargs": given})
    for optim in ("galore_adamw", "lomo"):
        with pytest.raises(UserError, match=f"optim='{optim}' .* survives a change of shape"):
            made(tmp_path, optim=optim)


class OwnOptimizer(APTTrainer):
    def create_optimizer(self, model: Any = None) -> Any:
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.Adagrad(trained, lr=0.02)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: 1 / (1 + step))
        return self.lr_scheduler


def test_an_optimizer_and_a_schedule_of_a_subclass_are_followed(tmp_path: Path) -> None:
    held = Held()
    trainer = made(tmp_path, OwnOptimizer, options={"callbacks": [SaveAt([9])]})
    held.trainer = trainer
    trainer.add_callback(held)
    trainer.train()
    assert set(held.seen.values()) == {(torch.optim.Adagrad, 0.02)}
    rates = [log["learning_rate"] for log in trainer.state.log_history if "loss" in log]
    assert rates == pytest.approx([0.02 / (1 + step) for step in range(12)])
    again = made(tmp_path / "again", OwnOptimizer)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-9"))
    assert_resumed(trainer, again, 9)


class KeepsTheFirst(OwnOptimizer):
    kept: Any = None

    def create_optimizer(self, model: Any = None) -> Any:
        self.kept = self.optimizer = self.kept or super().create_optimizer()
        return self.optimizer


class BaseOnly(OwnOptimizer):
    def create_optimizer(self, model: Any = None) -> Any:
        self.optimizer = torch.optim.SGD(self.model.classifier.parameters(), lr=0.1)
        return self.optimizer


class OneCosine(OwnOptimizer):
    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        self.lr_scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, num_training_steps)
        return self.lr_scheduler


class BothAtOnce(APTTrainer):
    def create_optimizer_and_scheduler(self, num_training_steps: int) -> None:
        raise AssertionError("is called by nobody")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (BaseOnly, "create_optimizer of BaseOnly made lacks .*lora_A"),
        (OneCosine, "create_scheduler of OneCosine must set self.lr_scheduler to a LambdaLR .*CosineAnnealingLR"),
        (BothAtOnce, "BothAtOnce overrides create_optimizer_and_scheduler, which the training loop does not call"),
    ],
)
def test_optimizers_of_a_subclass_that_train_part_of_it_are_refused(
    kind: type[APTTrainer], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        run_of(tmp_path, kind)


def test_which_parameters_decay_is_up_to_a_subclass(tmp_path: Path) -> None:
    class All(APTTrainer):
        def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
            return [name for name, _ in model.named_parameters()]

    trainer = made(tmp_path, All, weight_decay=0.1)
    assert {group["weight_decay"] for group in trainer.create_optimizer().param_groups} == {0.1}


# ---------------------------------------------------------------------------- data and the number of steps


def test_no_row_is_dropped_from_an_evaluation(tmp_path: Path) -> None:
    options = {"eval_dataset": Rows(19), "compute_metrics": lambda found: {"rows": len(found.predictions)}}
    trainer = made(tmp_path, options=options, dataloader_drop_last=True)
    trainer.train()
    assert trainer.evaluate()["eval_rows"] == 19
    assert trainer.evaluate(Rows(3), metric_key_prefix="test")["test_rows"] == 3
    assert trainer.args.dataloader_drop_last
    arguments = config(tmp_path / "plain", dataloader_drop_last=True)
    plain = plain_trainer(trainer.model, arguments, **options)
    assert plain.evaluate(Rows(3))["eval_rows"] == 3
    assert len(plain.predict(Rows(5)).predictions) == 5


def test_persistent_workers_do_not_mix_rows(tmp_path: Path) -> None:
    """The Trainer keeps a loader under one name, for validation, held-out rows and what is tested at the end."""
    rows: dict[str, list[int]] = {}
    for persistent in (True, False):
        found = rows[str(persistent)] = []
        options = {
            "eval_dataset": Rows(19),
            "heldout_dataset": Rows(7),
            "compute_metrics": lambda prediction, found=found: found.append(len(prediction.predictions)) or {},
        }
        changes = {"dataloader_num_workers": 1, "dataloader_persistent_workers": persistent, "eval_strategy": "steps"}
        trainer = run_of(tmp_path / str(persistent), options=options, eval_steps=4, **changes)
        trainer.evaluate(Rows(5))
        trainer.eval_dataset = Rows(6)
        trainer.evaluate()
        assert len(trainer.accelerator._dataloaders) <= (5 if persistent else 20)  # training and four sets of rows
        rows[str(persistent)] += [r["heldout_loss"] for r in events_of(tmp_path / str(persistent), "teacher")]
    assert rows["True"] == rows["False"] and rows["True"][:5] == [19, 19, 19, 5, 6]


class Sampled(APTTrainer):
    """A sampler of its own, which takes some rows twice."""

    def get_train_dataloader(self) -> Any:
        sampler = RandomSampler(self.train_dataset, replacement=True, num_samples=2 * len(self.train_dataset))
        loader = DataLoader(self.train_dataset, self._train_batch_size, sampler=sampler, collate_fn=self.data_collator)
        return self.accelerator.prepare(loader)


class Sized(IterableDataset[Any]):
    def __init__(self, number: int) -> None:
        self.rows = Rows(number)

    def __iter__(self) -> Iterator[Any]:
        return (self.rows[row] for row in range(len(self.rows)))

    def __len__(self) -> int:
        return len(self.rows)


class Stream(IterableDataset[Any]):
    def __init__(self, number: int) -> None:
        self.rows = Rows(number)

    def __iter__(self) -> Iterator[Any]:
        return (self.rows[row] for row in range(len(self.rows)))


def combinations() -> list[dict[str, Any]]:
    """Settings that decide about the number of steps, drawn with a seed."""
    generator = torch.Generator().manual_seed(5)

    def one_of(*values: Any) -> Any:
        return values[int(torch.randint(len(values), (), generator=generator))]

    return [
        {
            "rows": one_of(23, 31, 40, 64),
            "kind": one_of(APTTrainer, APTTrainer, Sampled),
            "data": one_of(Rows, Rows, Sized),
            "per_device_train_batch_size": one_of(3, 8),
            "gradient_accumulation_steps": one_of(1, 3, 4),
            "dataloader_drop_last": one_of(True, False),
            "num_train_epochs": one_of(1, 1.5, 3),
            "max_steps": one_of(-1, -1, 7),
            "train_sampling_strategy": one_of("random", "group_by_length", "batch_rebalance", "sequential"),
        }
        for _ in range(14)
    ]


@pytest.mark.parametrize("case", combinations(), ids=lambda case: "-".join(str(value) for value in case.values()))
def test_a_run_has_the_steps_that_its_schedule_counts_on(case: dict[str, Any], tmp_path: Path) -> None:
    kind = case["kind"] if case["data"] is Rows else APTTrainer
    changes = {name: value for name, value in case.items() if name not in ("rows", "kind", "data")}
    times = {"num_pruning_events": 1, "pruning_start": 0, "pruning_end": 1, "mask_window": 0}
    trainer = made(tmp_path, kind, data=case["data"](case["rows"]), **{**PLAIN, **times, **changes})
    foreseen = trainer.schedule.total
    trainer.train()
    assert foreseen == trainer.state.max_steps == trainer.state.global_step == trainer.schedule.total


def test_training_rows_that_make_no_batch_are_an_error(tmp_path: Path) -> None:
    for steps in (-1, 12):
        with pytest.raises(UserError, match="5 training rows make no whole batch of 8"):
            made(tmp_path, data=Rows(5), dataloader_drop_last=True, max_steps=steps)


@pytest.mark.parametrize(
    "changes",
    [
        {"eval_accumulation_steps": 1, "eval_strategy": "steps", "eval_steps": 5},
        {"eval_on_start": True, "eval_strategy": "steps", "eval_steps": 5},
        {"include_num_input_tokens_seen": "all"},
        {"neftune_noise_alpha": 5.0},
        {"dataloader_num_workers": 2},
        {"batch_eval_metrics": True, "eval_strategy": "steps", "eval_steps": 5},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_options_of_the_loop_go_with_pruning(changes: dict[str, Any], tmp_path: Path) -> None:
    def rows(prediction: Any, compute_result: bool = True) -> dict[str, float]:
        return {"rows": float(len(prediction.predictions))}

    trainer = run_of(tmp_path, options={"eval_dataset": Rows(19), "compute_metrics": rows}, **changes)
    assert trainer.pruner.sparsity() >= 0.5 and trainer.state.global_step == 12
    assert {len(values) for step, values in losses_of(trainer).items() if 3 <= step <= 10} == {3}
    embeddings = trainer.model.get_input_embeddings()
    assert not embeddings._forward_hooks and not hasattr(embeddings, "neftune_noise_alpha")


# ---------------------------------------------------------------------------- float16


class Overflow(TrainerCallback):
    """Makes the gradient of a hidden state infinite in one step, as an overflow does."""

    def __init__(self, step: int) -> None:
        self.step, self.trainer = step, None
        self.scales: list[float] = []
        self.rates: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._handle = None
        if state.global_step + 1 == self.step:
            layer = self.trainer.model.bert.encoder.layer[1]  # type: ignore[attr-defined]
            self._handle = layer.register_forward_hook(self._spoil)

    def _spoil(self, module: Any, args: Any, output: Any) -> None:
        hidden = output if torch.is_tensor(output) else output[0]
        if hidden.requires_grad:
            hidden.register_hook(lambda gradient: gradient * math.inf)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._handle is not None:
            self._handle.remove()
        self.scales.append(self.trainer.accelerator.scaler.get_scale())  # type: ignore[attr-defined]
        self.rates.append(self.trainer.lr_scheduler.last_epoch)  # type: ignore[attr-defined]


@pytest.mark.parametrize("importance", ["salience", "taylor"])
@pytest.mark.parametrize("step", [3, 6])
def test_a_step_whose_gradients_overflow_is_left_out_of_scores(step: int, importance: str, tmp_path: Path) -> None:
    """The scaler of float16 on the CPU: the step is left out of the optimizer, the schedule and the scores alike."""
    overflow = Overflow(step)
    trainer = made(tmp_path, importance=importance, observe_every=1, optim="adamw_torch")  # others do not tell
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    overflow.trainer = trainer  # type: ignore[assignment]
    trainer.add_callback(overflow)
    trainer.train()
    assert overflow.scales == [2.0**8 if at < step else 2.0**7 for at in range(1, 13)]
    assert overflow.rates == [at if at < step else at - 1 for at in range(1, 13)]
    assert trainer.pruner.sparsity() >= 0.5 and trainer.state.global_step == 12
    assert [record["step"] for record in events_of(tmp_path, "prune")] == [5, 8]
    assert all(torch.isfinite(value).all() for value in weights_of(trainer.model).values())


def test_only_steps_that_overflow_leave_nothing_to_score_by(tmp_path: Path) -> None:
    class Always(Overflow):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.step = state.global_step + 1
            super().on_step_begin(args, state, control, **kwargs)

    overflow = Always(0)
    trainer = made(tmp_path, **PLAIN)
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    overflow.trainer = trainer  # type: ignore[assignment]
    trainer.add_callback(overflow)
    with pytest.raises(UserError, match="Nothing finite was observed that units could be scored by"):
        trainer.train()


# ---------------------------------------------------------------------------- what a model holds already


def peft_model() -> Any:
    return get_peft_model(tiny_model("bert"), LoraConfig(target_modules=["query"]))


def with_added_adapter() -> Any:
    model = tiny_model("bert")
    inject_adapter_in_model(LoraConfig(target_modules=["query"]), model)  # what model.add_adapter does
    return model


def compiled_in_place() -> Any:
    model = tiny_model("bert")
    model.compile()
    return model


def on_meta() -> Any:
    return tiny_model("bert").to("meta")


def half_on_meta() -> Any:
    model = tiny_model("bert")
    model.classifier.to("meta")
    return model


def offloaded() -> Any:
    from accelerate import cpu_offload

    return cpu_offload(tiny_model("bert"), torch.device("cpu"))


def spread() -> Any:
    model = tiny_model("bert")
    model.hf_device_map = {"bert": 0, "classifier": "cpu"}
    return model


def quantised_by_torchao() -> Any:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = tiny_model("bert")
    quantize_(model, Int8WeightOnlyConfig())
    return model


def quantised_by_bitsandbytes() -> Any:
    from bitsandbytes.nn import Linear8bitLt

    model = tiny_model("bert")
    old = model.bert.encoder.layer[0].output.dense
    model.bert.encoder.layer[0].output.dense = Linear8bitLt(old.in_features, old.out_features, has_fp16_weights=False)
    parameter = model.bert.encoder.layer[0].output.dense.weight
    parameter.data = parameter.data.to(torch.int8)
    return model


def eight_bit_floats() -> Any:
    model = tiny_model("bert")
    model.classifier.weight = nn.Parameter(
        model.classifier.weight.detach().to(torch.float8_e4m3fn), requires_grad=False
    )
    return model


GIVEN: dict[str, tuple[Callable[[], Any], str]] = {
    "PeftModel": (peft_model, r"is a PeftModel\w* of PEFT.*merge_and_unload"),
    "add_adapter": (with_added_adapter, "holds adapters of PEFT already, in 3 layers such as bert.encoder"),
    "lora": (lambda: adapted(tiny_model("bert")), "holds adapters of PEFT already"),
    "DataParallel": (lambda: nn.DataParallel(tiny_model("bert")), r"wrapped in DataParallel\. Give model.module"),
    "compiled": (lambda: torch.compile(tiny_model("bert")), "is compiled"),
    "compiled in place": (compiled_in_place, "is compiled"),
    "meta": (on_meta, "on the meta device, such as bert.embeddings"),
    "half on meta": (half_on_meta, "2 tensors of the model are on the meta device, such as classifier.weight"),
    "offloaded": (offloaded, "spread by device_map"),
    "spread": (spread, r"spread by device_map \(0, cpu\)"),
    "torchao": (quantised_by_torchao, "quantised weights"),
    "bitsandbytes": (quantised_by_bitsandbytes, "quantised weights"),
    "float8": (eight_bit_floats, "quantised weights"),
    "module": (lambda: nn.Linear(2, 2), "Linear has no config"),
}


@pytest.mark.parametrize("name", GIVEN)
def test_a_model_that_holds_something_already_is_refused_by_name(name: str, tmp_path: Path) -> None:
    make, message = GIVEN[name]
    with pytest.raises(UserError, match=message):
        made(tmp_path, model=make())


def test_a_second_trainer_on_the_same_model_is_refused(tmp_path: Path) -> None:
    model = tiny_model("bert")
    arguments = config(tmp_path, **SHORT, tune="full")
    trainer = APTTrainer(model, arguments, Rows(92), heldout_dataset=HELD)
    with pytest.raises(UserError, match="in use by another APTTrainer, whose run has not finished"):
        APTTrainer(model, arguments, Rows(92), heldout_dataset=HELD)
    trainer.train()
    assert not hasattr(trainer.model, "_apt_in_use")


class Interrupt(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 9:
            raise KeyboardInterrupt


def test_an_interrupted_run_goes_on_in_a_new_trainer_alone(tmp_path: Path) -> None:
    options = {"callbacks": [SaveAt([6]), Interrupt()]}
    trainer = made(tmp_path / "run", options=options)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    with pytest.raises(UserError, match=r"This trainer was interrupted.*resume_from_checkpoint=True"):
        trainer.train()
    with pytest.raises(UserError, match=r"in use by another APTTrainer.*train\(resume_from_checkpoint=True\)"):
        made(tmp_path / "other", model=trainer.model)
    again = made(tmp_path / "run")
    again.train(resume_from_checkpoint=True)
    assert_resumed(run_of(tmp_path / "straight"), again, 6)


def test_a_model_that_was_only_tuned_can_be_trained_again(tmp_path: Path) -> None:
    trainer = run_of(tmp_path / "one", target_sparsity=None, **PLAIN)
    model = copy.deepcopy(trainer.model)
    if not hasattr(model.config, "apt_structure"):
        assert run_of(tmp_path / "two", model=model).pruner.sparsity() >= 0.5


def test_a_teacher_that_is_the_student_is_refused(tmp_path: Path) -> None:
    model = tiny_model("bert")
    changes = {"distillation": "model", "teacher_name_or_path": "given"}
    with pytest.raises(UserError, match="teacher is the model itself"):
        made(tmp_path, model=model, options={"teacher": model}, **changes)


# ---------------------------------------------------------------------------- other ways to begin


def test_a_stream_trains_as_the_rows_in_it(tmp_path: Path) -> None:
    changes = {"train_sampling_strategy": "sequential", **ACCUMULATED}
    rows = run_of(tmp_path / "rows", data=Rows(96), **changes)
    for name, stream in (("torch", Stream(96)), ("datasets", hf_stream(96))):
        assert_same(rows, run_of(tmp_path / name, data=stream, **changes))


def hf_stream(number: int) -> Any:
    rows = Rows(number)
    return datasets.Dataset.from_list(
        [{name: value.tolist() for name, value in rows[row].items()} for row in range(number)]
    ).to_iterable_dataset()


def test_a_stream_whose_last_micro_batches_are_too_few_steps_on_whole_ones(tmp_path: Path) -> None:
    """23 micro-batches of 2 make five steps of 4; what is left would be added to the first step of the next pass."""
    changes = {"train_sampling_strategy": "sequential", **ACCUMULATED}
    stream = run_of(tmp_path / "stream", data=Stream(46), **changes)
    rows = run_of(tmp_path / "rows", data=Subset(Rows(46), range(40)), **changes)
    assert_same(stream, rows)


@pytest.mark.parametrize("importance", ["salience", "nri"])
def test_rows_that_score_come_from_a_stream_too(importance: str, tmp_path: Path) -> None:
    before = {**PLAIN, "pruning_time": "before", "pruning_start": None, "calibration_samples": 16}
    changes = {**before, "importance": importance, "train_sampling_strategy": "sequential"}
    if importance == "nri":
        changes |= {"prune_targets": ["sublayers"], "target_sparsity": 0.3}
    one = run_of(tmp_path / "stream", data=Stream(96), **changes)
    assert one.pruner.sparsity() >= changes.get("target_sparsity", 0.5) and one.state.global_step == 12


def test_what_a_stream_cannot_tell_is_asked_for(tmp_path: Path) -> None:
    for data in (Stream(96), hf_stream(96)):
        with pytest.raises(UserError, match=r"no rows can be split off .*Give heldout_dataset"):
            made(tmp_path, data=data, options={"heldout_dataset": None})
        with pytest.raises(UserError, match="no length, so max_steps has to say"):
            made(tmp_path, data=data, max_steps=-1, options={"heldout_dataset": None}, **PLAIN)


def test_a_stream_that_ends_early_keeps_the_model_and_says_what_is_missing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Once(Stream):
        def __iter__(self) -> Iterator[Any]:
            self.rows, rows = [], self.rows  # type: ignore[assignment]
            return iter([rows[row] for row in range(len(rows))])

    trainer = run_of(tmp_path, data=Once(48), **PLAIN)
    assert trainer.state.global_step == 6
    assert "ended at step 6 of 12" in caplog.text and "step 8" in caplog.text
    trainer.save_model(str(tmp_path / "model"))
    assert (tmp_path / "model" / "config.json").exists()


def test_model_init_makes_the_model_of_each_run(tmp_path: Path) -> None:
    given = {"model_init": lambda: tiny_model("bert"), "heldout_dataset": HELD}
    trainer = made(tmp_path / "init", options=given)
    trainer.train()
    first = losses_of(trainer), weights_of(trainer.model)
    trainer.train()
    assert losses_of(trainer) == first[0]
    assert all(torch.equal(value, first[1][name]) for name, value in weights_of(trainer.model).items())
    set_seed(7)
    alone = APTTrainer(tiny_model("bert"), config(tmp_path / "alone", **SHORT), Rows(92), heldout_dataset=HELD)
    alone.train()
    assert losses_of(alone) == first[0]
    for wrong in ({"model_init": None}, {"model_init": lambda: tiny_model("bert")}):
        with pytest.raises(UserError, match="Give either a model or model_init"):
            model = None if wrong["model_init"] is None else tiny_model("bert")
            APTTrainer(model, config(tmp_path), Rows(), **wrong)


class Trial(dict[str, Any]):
    """What the trainer asks of a trial of optuna."""

    number = 0
    params: dict[str, Any] = {}


def test_a_search_over_settings_of_the_method_trains_a_new_model_for_each_trial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.integrations.hp_params", dict)  # knows installed backends alone
    options = {"model_init": lambda trial: tiny_model("bert"), "heldout_dataset": HELD, "eval_dataset": Rows(19)}
    trainer = made(tmp_path, options=options)
    trainer.hp_search_backend, trainer.hp_space = HPSearchBackend.OPTUNA, dict
    trainer.compute_objective, trainer.hp_name = lambda metrics: metrics["eval_loss"], lambda trial: "a trial"
    found = {}
    for target, rank in ((0.3, 4), (0.5, 2)):
        trainer.train(trial=Trial(target_sparsity=target, lora_r=rank, learning_rate=1e-3))
        ranks = events_of(tmp_path, "prune")[0]["ranks"].values()
        found[target] = trainer.pruner.sparsity(), losses_of(trainer)
        assert trainer.pruner.sparsity() >= target and min(ranks) >= rank
        assert math.isfinite(trainer.evaluate()["eval_loss"])
    assert found[0.3][0] < found[0.5][0]
    alone = {"model_init": lambda: tiny_model("bert")}
    assert found[0.5][1] == losses_of(run_of(tmp_path / "alone", options=alone))
    with pytest.raises(UserError, match="target_sparsity=60"):
        trainer.train(trial=Trial(target_sparsity=60))


def test_several_devices_without_a_launcher_are_refused_with_the_command(tmp_path: Path) -> None:
    arguments = config(tmp_path)
    arguments._n_gpu = 4
    with pytest.raises(UserError, match="sees 4 GPUs .*--accelerate_config ddp.*torchrun --nproc_per_node 4"):
        APTTrainer(tiny_model("bert"), arguments, Rows())
    arguments._n_gpu = 1
    check_launch(arguments)


def test_arguments_of_the_stock_trainer_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="args is TrainingArguments. Give an APTConfig"):
        APTTrainer(tiny_model("bert"), TrainingArguments(str(tmp_path)), Rows())  # type: ignore[arg-type]


# ---------------------------------------------------------------------------- two processes

WORKER = """
import json, os, sys
sys.path[:0] = [{root!r}, {tests!r}]
from pathlib import Path
import torch
torch.set_num_threads(1)
from edges.test_own_trainers import LossAlone, of_two_processes
from integration.factories import losses_of

folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
trainer = of_two_processes(folder / "run", 4, ddp_backend="gloo")
found = {{"losses": losses_of(trainer), "sparsity": trainer.pruner.sparsity(), "world": trainer.args.world_size}}
(folder / f"result.{{rank}}.json").write_text(json.dumps(found))
os._exit(0)
"""


def of_two_processes(folder: Path, size: int, **changes: Any) -> APTTrainer:
    """A subclass and an optimizer of the user's own."""
    options = {"optimizer_cls_and_kwargs": (torch.optim.NAdam, {"lr": 1e-3})}
    data = Subset(Rows(96), range(88))
    return run_of(folder, LossAlone, options, data=data, per_device_train_batch_size=size, **changes)


@pytest.mark.distributed
def test_two_processes_with_a_subclass_and_its_optimizer_equal_one(tmp_path: Path) -> None:
    two_processes(tmp_path, WORKER, "result.0.json", "result.1.json")
    alone = of_two_processes(tmp_path / "alone", 8)
    for rank in (0, 1):
        found = json.loads((tmp_path / f"result.{rank}.json").read_text())
        assert found["world"] == 2 and found["sparsity"] == alone.pruner.sparsity()
        for step, values in losses_of(alone).items():
            assert found["losses"][str(step)] == pytest.approx(values, rel=1e-4), step
