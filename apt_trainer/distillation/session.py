"""The distillation side of a run: when snapshots are due, the loss against the teacher, what a checkpoint needs.

The parts (snapshot, losses, layer map, transform) are in ``distillation``; this file gives them their settings and
their place in time. Not for deciding what is pruned.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from apt_trainer.distillation.layer_map import match_layers, sample_teacher_layers
from apt_trainer.distillation.losses import embedding_loss, layer_loss, layer_outputs, prediction_loss
from apt_trainer.distillation.teacher import Teacher
from apt_trainer.distillation.transform import HiddenTransform
from apt_trainer.models import HIDDEN, ModelFamily, Stack
from apt_trainer.models.batch import of_stack, predicted_tokens, real_tokens
from apt_trainer.models.labels import problem_type
from apt_trainer.models.shares import Shares
from apt_trainer.plan.schedule import Schedule
from apt_trainer.settings import MethodSettings
from apt_trainer.surgery.slicing import Edit, Edits, Grow, Keep
from apt_trainer.surgery.tuning import TRANSFORM
from apt_trainer.tensors.partitioned import is_partitioned

Pooling = Callable[[torch.Tensor, Mapping[str, Any]], torch.Tensor]
"""From hidden states [B, S, d] and the inputs of their pass to embeddings [B, d]."""


class SelfDistillation:
    """Holds the teacher and, while distillation lasts, puts a trainable transform on the student."""

    def __init__(
        self,
        settings: MethodSettings,
        num_hidden: int,
        seed: int,
        teacher: nn.Module | None,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
        label_order: Sequence[int] | None = None,
        pooling: Pooling | None = None,
        layers: bool = True,
    ) -> None:
        """``num_hidden``: the student's hidden dimensions; ``autocast``: mixed precision of the teacher's forward;
        ``label_order``: where in the teacher's logits the student's labels are, None: at the same places.
        ``pooling``: what becomes of the hidden states of a student without logits, None: each token is compared.
        ``layers``: whether hidden states within the student can be compared."""
        self.settings, self.seed, self.num_student, self.autocast = settings, seed, num_hidden, autocast
        self.pooling, self._has_layers = pooling, layers
        self.teacher = Teacher(num_hidden) if teacher is None else Teacher.external(teacher, label_order=label_order)

    @property
    def ready(self) -> bool:
        """Whether there is a teacher to learn from."""
        return self.teacher.model is not None

    @property
    def uses_layers(self) -> bool:
        s = self.settings
        return self._has_layers and s.layer_weight > 0 and s.distillation_layer_map != "none"

    def snapshot_due(self, schedule: Schedule, step: int) -> bool:
        """At the start of pruning and after each event but the last: always when no unit is masked."""
        if self.settings.distillation != "self" or not schedule.events:
            return False
        return step in {schedule.start, *schedule.events[:-1]}

    def offer(self, student: nn.Module, heldout_loss: float) -> bool:
        """Let ``student`` become the teacher if its held-out loss is the least so far."""
        taken = self.teacher.offer(student, heldout_loss)
        if taken and hasattr(self.teacher.model, TRANSFORM):
            delattr(self.teacher.model, TRANSFORM)  # the student's own map to its teacher is no part of a teacher
        return taken

    def teach(self, inputs: Mapping[str, Any]) -> Any:
        """Outputs of the teacher for a batch. Before the student's forward pass: while that runs, a parameter that the
        two share can be on its way to the device (ZeRO-3)."""
        with self.autocast():
            return self.teacher.forward(inputs, output_hidden_states=self.uses_layers)

    def loss(
        self,
        inputs: Mapping[str, Any],
        outputs: Any,
        teacher: Any,
        student: nn.Module,
        family: ModelFamily,
        alive: Mapping[Stack, list[bool]],
        step: int,
        shares: Shares | None = None,
        difference: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Weighted sum of prediction and layer loss for one micro-batch; scalar float32.

        ``outputs`` are the student's, ``teacher`` is what :meth:`teach` gave; ``difference``: of their predictions,
        where it is known and the two have no logits. Without, embeddings are what is predicted. The layer loss is the
        mean over the stacks of ``alive``, each with pairs of its own. All means are weighed by their ``shares``;
        without, the batch stands alone.
        """
        s, tokens, shares = self.settings, real_tokens(inputs, family), shares or Shares.whole(family)
        share = shares.predictions
        if difference is None and not ("logits" in outputs or "start_logits" in outputs):
            last = family.stacks[-1].stack
            difference = self._embedding_loss(inputs, outputs, teacher, of_stack(tokens, last))
            if self.pooling is None:  # a mean over tokens
                share = shares.tokens[last]
        elif difference is None:
            predicted = predicted_tokens(inputs, family, student)
            per_row = "logits" in outputs and outputs["logits"].dim() == 2
            problem = problem_type(student.config, inputs.get("labels")) if per_row else None
            difference = prediction_loss(outputs, teacher, s.distillation_temperature, predicted, problem)
        loss = s.prediction_weight * share * difference
        if not self.uses_layers:
            return loss
        transform, normalise = getattr(student, TRANSFORM), not family.post_norm
        # every parameter takes part in every step, which DDP relies on; through its forward, as ZeRO-3 needs it
        nothing = loss.new_zeros(1, 1, self.num_student, requires_grad=True)
        distance = 0.0 * transform(nothing).sum()
        for stack, left in alive.items():
            ours, theirs = layer_outputs(outputs, stack), layer_outputs(teacher, stack)
            left = left * family.repeats(student.config)  # a layer that runs several times has as many outputs
            mask = of_stack(tokens, stack)
            layers = sample_teacher_layers(
                len(theirs), s.distillation_layers, self.seed, step, s.distillation_layer_map
            )
            pairs = match_layers(layers, left, ours, theirs, transform, mask, normalise)
            apart = layer_loss(ours, theirs, pairs, transform, mask, normalise)
            distance = distance + shares.tokens[stack] * apart / len(alive)
        return loss + s.layer_weight * distance

    def _embedding_loss(
        self, inputs: Mapping[str, Any], outputs: Any, teacher: Any, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """Of a student without logits: its embeddings beside the teacher's, in the hidden dimensions it has left."""
        ours, theirs = outputs["last_hidden_state"], teacher["last_hidden_state"]
        if ours.shape[-1] != theirs.shape[-1]:
            assert self.teacher.hidden_index is not None, "an external teacher of another width"
            theirs = theirs.index_select(-1, self.teacher.hidden_index.to(theirs.device))
        if self.pooling is None:
            return embedding_loss(ours, theirs, mask)
        return embedding_loss(self.pooling(ours, inputs), self.pooling(theirs, inputs))

    # ------------------------------------------------------------------ shape changes

    def transform_due(self, student: nn.Module, schedule: Schedule, step: int) -> bool:
        """Whether the transform has to come or go after ``step``."""
        wanted = self.uses_layers and self.ready and schedule.distils(step)
        return wanted != hasattr(student, TRANSFORM) or (wanted and self._is_stale(student))

    def keep_transform(self, student: nn.Module, schedule: Schedule, step: int) -> Edits:
        """Attach, re-aim or remove the transform on the plain student; the teacher goes when distillation ends."""
        if self.ready and not schedule.distils(step) and step >= schedule.distillation_end:
            self.teacher.model = None
        if not self.transform_due(student, schedule, step):
            return {}
        if not (self.uses_layers and self.ready and schedule.distils(step)):
            delattr(student, TRANSFORM)
            return {}
        if hasattr(student, TRANSFORM):
            return _edits(getattr(student, TRANSFORM).retarget())
        self._attach_transform(student, self.settings.lora_r, self.teacher.hidden_index)
        return {}

    def follow(self, student: nn.Module, survivors: Mapping[str, torch.Tensor], growth: float) -> Edits:
        """After a cut: narrow the transform's input, raise its rank as adapters grew, stop sharing what trains."""
        edits: Edits = {}
        transform = getattr(student, TRANSFORM, None)
        if HIDDEN in survivors:
            self.num_student = len(survivors[HIDDEN])
            self.teacher.follow(survivors[HIDDEN])
            if transform is not None:
                edits |= _edits(transform.cut_inputs(survivors[HIDDEN]))
        if transform is not None and 0 < transform.rank < 2 * self.settings.max_rank and growth > 1:
            rank = min(int(transform.rank * growth), 2 * self.settings.max_rank)
            if rank > transform.rank:
                generator = torch.Generator().manual_seed(self.seed * 1_000_003 + rank)
                for name, of_parameter in _edits(transform.grow(rank - transform.rank, generator)).items():
                    edits.setdefault(name, []).extend(of_parameter)
        self.teacher.own(p for p in student.parameters() if p.requires_grad)
        return edits

    def end(self, student: nn.Module) -> None:
        """Drop teacher and transform."""
        self.teacher.model = None
        if hasattr(student, TRANSFORM):
            delattr(student, TRANSFORM)

    # ------------------------------------------------------------------ checkpoints

    def state(self, student: nn.Module) -> dict[str, Any]:
        """JSON part of a checkpoint; the teacher's weights are saved beside it."""
        state = self.teacher.state_dict()
        transform = getattr(student, TRANSFORM, None)
        return state | {
            "best_loss": None if state["best_loss"] == float("inf") else state["best_loss"],
            "hidden_index": _to_list(state["hidden_index"]),
            "num_student": self.num_student,
            "transform_rank": None if transform is None else transform.rank,
            "transform_index": None if transform is None else _to_list(transform.hidden_index),
        }

    def restore(self, state: Mapping[str, Any], teacher: nn.Module | None) -> None:
        """Put :meth:`state` back; ``teacher`` is the snapshot with its weights, if there was one."""
        self.num_student = state["num_student"]
        self.teacher.load_state_dict(
            {
                "best_loss": float("inf") if state["best_loss"] is None else state["best_loss"],
                "hidden_index": _to_index(state["hidden_index"]),
                "num_hidden": state["num_hidden"],
            }
        )
        if not self.teacher.is_external:
            self.teacher.model = teacher

    def restore_transform(self, state: Mapping[str, Any], student: nn.Module) -> None:
        """Attach a transform of the saved shape, before weights are loaded."""
        if state["transform_rank"] is not None:
            self._attach_transform(student, state["transform_rank"], _to_index(state["transform_index"]))

    def _attach_transform(self, student: nn.Module, rank: int, index: torch.Tensor | None) -> None:
        if self.settings.details.distillation_transform == "identity":
            rank = 0
        generator = torch.Generator().manual_seed(self.seed)
        transform = HiddenTransform(
            self.num_student, self.teacher.num_hidden, rank, hidden_index=index, generator=generator
        )
        example = next(student.parameters())
        if is_partitioned(example):  # else an engine that is to come gives the type
            transform.to(example.dtype)
        student.add_module(TRANSFORM, transform.to(example.device))

    def _is_stale(self, student: nn.Module) -> bool:
        """Whether the teacher was replaced by a narrower snapshot since the transform was made."""
        transform = getattr(student, TRANSFORM)
        return bool(transform.num_teacher != self.teacher.num_hidden)


def split_heldout(train: Any, number: int, seed: int) -> tuple[Any, Any]:
    """(training data, ``number`` rows held out to choose snapshots on, or None for 0)."""
    if number == 0:
        return train, None
    if hasattr(train, "train_test_split"):
        parts = train.train_test_split(test_size=number, seed=seed)
        return parts["train"], parts["test"]
    generator = torch.Generator().manual_seed(seed)
    rest, chosen = torch.utils.data.random_split(train, [len(train) - number, number], generator=generator)
    return rest, chosen


def _to_list(index: torch.Tensor | None) -> list[int] | None:
    return None if index is None else index.tolist()


def _to_index(values: list[int] | None) -> torch.Tensor | None:
    return None if values is None else torch.tensor(values, dtype=torch.long)


def _edits(raw: list[tuple[str, int, Any]]) -> Edits:
    edits: Edits = {}
    for name, dim, what in raw:
        edit: Edit = Keep(dim, what) if torch.is_tensor(what) else Grow(dim, what)
        edits.setdefault(f"{TRANSFORM}.{name}", []).append(edit)
    return edits
