"""Short runs of the trainer on tiny models: data, settings, a recorder of what happens at each step.

Models come from ``tests/tiny.py``. Not for checks: those are in the test modules.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tiny import LABELS, LANGUAGE_MODELS, VOCABULARY, parts, tiny_config, tiny_model
from torch import nn
from torch.utils.data import Dataset
from transformers import AutoModelForSequenceClassification, PreTrainedModel, TrainerCallback, set_seed

from apt_trainer import APTConfig, APTTrainer, Importance, PruningPlan
from apt_trainer.models import Space
from apt_trainer.plan.cost import parameter_cost
from apt_trainer.pruning.pruner import PruningEvent
from apt_trainer.surgery.cutting import apply_plan
from apt_trainer.training.engines.base import plain_optimizer

LENGTH = 10
DEFAULTS: dict[str, Any] = {
    "max_steps": 50,
    "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 16,
    "learning_rate": 1e-3,
    "target_sparsity": 0.5,
    "num_pruning_events": 3,
    "pruning_start": 6,
    "pruning_end": 30,
    "mask_window": 4,
    "distillation_end": 40,
    "distillation_weight": 1.0,
    "round_to": 4,
    "min_hidden": 8,
    "lora_r": 2,
    "lora_alpha": 4,
    "max_rank": 8,
    "heldout_fraction": 0.1,
    "use_cpu": True,
    "report_to": [],
    "logging_steps": 1,
    "disable_tqdm": True,
    "seed": 7,
}
"""50 steps: warm-up to 6, events after 14, 22 and 30 with masks in the 4 steps before each, distillation to 40."""

SHORT = {"max_steps": 12, "num_pruning_events": 2, "pruning_start": 2, "pruning_end": 8, "mask_window": 2}
SHORT |= {"distillation_end": 10}
EVENTS = (14, 22, 30)

GLOBAL_BATCH = 8
CHANGES: dict[str, Any] = {**SHORT, "max_steps": 20, "pruning_end": 14, "distillation_end": 17, "mask_window": 4}
CHANGES |= {"tune_after_distillation": "full", "max_grad_norm": 1.0}
SAVED = (6, 10)
"""In the first mask window with a teacher; after the first event."""


class Rows(Dataset[dict[str, torch.Tensor]]):
    """Random token rows with labels of one task ("classification", "several" labels, "regression", "tokens",
    "answers", "text" after a prompt, or "target", a text of its own)."""

    def __init__(self, number: int = 110, task: str = "classification", padded: bool = True) -> None:
        generator = torch.Generator().manual_seed(11)
        self.ids = torch.randint(4, VOCABULARY, (number, LENGTH), generator=generator)
        lengths = torch.randint(LENGTH // 2, LENGTH + 1, (number,), generator=generator)
        self.mask = torch.ones_like(self.ids)
        if padded:
            self.mask = (torch.arange(LENGTH) < lengths[:, None]).long()
            self.ids = torch.where(self.mask.bool(), self.ids, 1)
        self.labels = self._labels(task, generator)

    def _labels(self, task: str, generator: torch.Generator) -> dict[str, torch.Tensor]:
        number = len(self.ids)
        if task == "answers":
            starts = torch.randint(0, 3, (number,), generator=generator)
            return {"start_positions": starts, "end_positions": starts + 1}
        if task == "text":
            return {"labels": torch.where(self.mask.bool() & (torch.arange(LENGTH) > 1), self.ids, -100)}
        if task == "target":
            kept = torch.arange(LENGTH - 3) < LENGTH - 3 - torch.arange(number)[:, None] % 3
            return {"labels": torch.where(kept, self.ids[:, 3:], -100)}
        if task == "tokens":
            return {"labels": torch.where(self.mask.bool(), self.ids % LABELS, -100)}
        if task == "regression":
            return {"labels": self.ids.float().mean(1) / VOCABULARY}
        if task == "several":
            return {"labels": (self.ids[:, :LABELS] % 2).float()}
        return {"labels": self.ids[:, 0] % LABELS}

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        labels = {name: values[row] for name, values in self.labels.items()}
        return {"input_ids": self.ids[row], "attention_mask": self.mask[row], **labels}


class Fixed(Importance):
    """Scores 1 for every unit but those whose spaces or positions are named: {space: score or scores of all units}."""

    def __init__(self, scores: Mapping[str, float | Sequence[float]] | None = None) -> None:
        self.given, self.current = dict(scores or {}), dict[str, torch.Tensor]()
        self.updates = 0

    def attach(self, model: nn.Module, spaces: Sequence[Space], counts: Mapping[str, int]) -> None:
        for space in spaces:
            if space.name not in self.current:
                falling = torch.linspace(1.0, 0.5, space.size)
                given = self.given.get(space.name, 1.0)
                self.current[space.name] = falling * torch.as_tensor(given, dtype=torch.float32)

    def update(self, reduce: Any, processes: int) -> None:
        self.updates += 1

    def scores(self, model: nn.Module) -> dict[str, torch.Tensor]:
        return dict(self.current)

    def follow(self, survivors: Mapping[str, torch.Tensor]) -> None:
        for name, index in survivors.items():
            self.current[name] = self.current[name].index_select(0, index)


def config(output_dir: Path, **changes: Any) -> APTConfig:
    """Settings of a run of 50 steps with three events, changed by ``changes``."""
    return APTConfig(output_dir=str(output_dir), **{**DEFAULTS, **changes})


def make_trainer(
    output_dir: Path,
    model: PreTrainedModel | None = None,
    data: Dataset[Any] | None = None,
    options: Mapping[str, Any] | None = None,
    **changes: Any,
) -> APTTrainer:
    """Trainer of a tiny encoder; ``options`` go to the trainer, ``changes`` to its settings."""
    gc.collect()
    gc.freeze()  # each change of shape collects garbage, which would walk over every imported module
    set_seed(3)
    model = tiny_model("bert") if model is None else model
    data = Rows() if data is None else data
    return APTTrainer(model, config(output_dir, **changes), data, **(options or {}))


def comparable(
    output_dir: Path, saved: Iterable[int] = (), callbacks: Iterable[Any] = (), dropout: float = 0.0, **changes: Any
) -> APTTrainer:
    """Trainer of a run that is the same however its batches are cut: rows without padding, a multiple of the batch.

    Events, a transform that comes and goes, merged adapters, clipping and evaluations; checkpoints after ``saved``.
    """
    options: dict[str, Any] = {"heldout_dataset": Rows(16, padded=False), "eval_dataset": Rows(32, padded=False)}
    options["callbacks"] = [SaveAt(saved), *callbacks]
    model = tiny_model("bert", dropout=dropout)
    evaluated = {"eval_strategy": "steps", "eval_steps": 7}
    return make_trainer(output_dir, model, Rows(96, padded=False), options, **{**CHANGES, **evaluated, **changes})


def trained(
    output_dir: Path, saved: Iterable[int] = (), resume: Path | None = None, dropout: float = 0.0, **changes: Any
) -> APTTrainer:
    """What :func:`comparable` gives, trained from the start or from the checkpoint ``resume``."""
    trainer = comparable(output_dir, saved, dropout=dropout, **changes)
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return trainer


def unpadded(name: str) -> tuple[PreTrainedModel, Rows, dict[str, Any]]:
    """Model, rows and trainer options of a run called ``name``: of that language model, or of an encoder, with a
    teacher of its own where it is "teacher"; no padding, so that the batches of two processes weigh the same."""
    task = "text" if name in LANGUAGE_MODELS else "classification"
    model = tiny_model(name, LANGUAGE_MODELS[name]) if name in LANGUAGE_MODELS else tiny_model("bert")
    options: dict[str, Any] = {"heldout_dataset": Rows(16, task, padded=False)}
    if name == "teacher":
        set_seed(5)
        config = tiny_config("bert", 2, num_labels=3)
        options = {"teacher": AutoModelForSequenceClassification.from_config(config)}
    return model, Rows(96, task, padded=False), options


@dataclass
class Moment:
    """The student at one step."""

    weights: dict[str, torch.Tensor]
    trained: set[str]
    moments: dict[str, dict[str, torch.Tensor]]
    rates: list[float]
    in_optimizer: set[str]
    tune: str
    plan: PruningPlan
    sublayers: dict[str, str] = field(default_factory=dict)


class Recorder(TrainerCallback):
    """Keeps a :class:`Moment` of every step in ``at``. Given to the trainer as a callback it sees each step before the
    trainer's own work on it; added with ``trainer.add_callback``, after it."""

    def __init__(self, steps: Iterable[int]) -> None:
        self.steps, self.at = set(steps), dict[int, Moment]()
        self.trainer: APTTrainer | None = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step in self.steps:
            assert self.trainer is not None
            self.at[state.global_step] = moment(self.trainer)


def moment(trainer: APTTrainer) -> Moment:
    model, optimizer = trainer.model, plain_optimizer(trainer)
    named = dict(model.named_parameters())
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    return Moment(
        weights={name: p.detach().clone() for name, p in named.items()},
        trained={name for name, p in named.items() if p.requires_grad},
        moments={
            name: {key: value.clone() for key, value in optimizer.state[p].items()}
            for name, p in named.items()
            if p in optimizer.state
        },
        rates=[group["lr"] for group in optimizer.param_groups],
        in_optimizer={name for name, p in named.items() if id(p) in held},
        tune=trainer.pruner.tune,
        plan=trainer.pruner.plan,
    )


def watch(trainer: APTTrainer, before: Recorder, after: Recorder) -> list[PruningEvent]:
    """Attach both recorders (``before`` must have been given as a callback); returns the list that events go to."""
    before.trainer = after.trainer = trainer
    trainer.add_callback(after)
    events: list[PruningEvent] = []
    apply: Callable[..., PruningEvent] = trainer.pruner.apply

    def spy(*args: Any) -> PruningEvent:
        events.append(apply(*args))
        return events[-1]

    trainer.pruner.apply = spy  # type: ignore[method-assign]
    return events


class SaveAt(TrainerCallback):
    """Writes a checkpoint after each of ``steps``."""

    def __init__(self, steps: Iterable[int]) -> None:
        self.steps = set(steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        control.should_save = state.global_step in self.steps
        return control


def events_of(folder: Path, *kinds: str) -> list[dict[str, Any]]:
    """Records of ``events.jsonl``, of the named kinds or all."""
    records = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    return [record for record in records if not kinds or record["kind"] in kinds]


def losses_of(trainer: APTTrainer) -> dict[int, tuple[float, ...]]:
    """Every logged loss by step: total, task, distillation where there is one."""
    names = ("loss", "task_loss", "distillation_loss")
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {entry["step"]: tuple(entry[name] for name in names if name in entry) for entry in logs}


def weights_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def counted_block_parameters(trainer: APTTrainer) -> int:
    """Parameters of the blocks, counted on the real tensors, adapters excluded."""
    blocks = tuple(path + "." for path in trainer.pruner.family.block_modules(trainer.model))
    named = trainer.model.named_parameters()
    return sum(p.numel() for name, p in named if name.startswith(blocks) and ".lora_" not in name)


def target_of(model: PreTrainedModel, counts: Mapping[str, int]) -> float:
    """``target_sparsity`` at which just what ``counts`` leaves of the named spaces (and all of the others) fits."""
    family, spaces, dense = parts(model)
    cost = parameter_cost(model, family, spaces)
    return 1 - cost.total({**dense.counts, **counts}) / cost.total(dense.counts) - 1e-9


def cut_copy(dense: PreTrainedModel, plan: PruningPlan) -> PreTrainedModel:
    """``dense`` cut to ``plan`` in place: what its weights must be where none of them trained."""
    family, spaces, full = parts(dense)
    apply_plan(dense, family, spaces, full, plan)
    return dense
