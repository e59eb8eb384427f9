"""The method's part of a training step, round whatever the trainer's own methods do.

``get_batch_samples``, ``training_step`` and ``compute_loss`` may be overridden, without a call of ``super()`` too:
while an epoch runs all three are wrapped from outside. Micro-batches are counted as they are fetched. The loss of the
task is what ``compute_loss`` returns, once per micro-batch, weighed by its share. The distance to the teacher is taken
where the student is run: what it is given is seen, which the teacher is given too, and what it gives.
What cannot work is an error at the first micro-batch. Not for the losses themselves (``step_losses``,
``distillation``).
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import Seq2SeqTrainer, Trainer
from transformers.trainer_utils import has_length

from apt_trainer.errors import UserError
from apt_trainer.models.batch import Tokens, real_tokens
from apt_trainer.training.engines import engine_of
from apt_trainer.training.fused_head import FUSED, with_log_probs
from apt_trainer.training.inside import replaced, watched_forward
from apt_trainer.training.label_logits import LabelLogits, LabelPositions

_NO_DATA = ("output_hidden_states", "output_attentions", "return_dict", "use_cache", "num_items_in_batch", FUSED)
"""Arguments of a forward pass that say what is wanted of it."""
_TOKENS = ("input_ids", "inputs_embeds", "pixel_values", "attention_mask")

_COMPARED = {"logits", "start_logits", "log_probs", "last_hidden_state"}
"""Outputs by which a student can be compared with its teacher; log_probs: where logits can be had (``fused_head``)."""


@dataclass
class Pass:
    """A forward pass of the student: its ``inputs`` by name, its ``outputs``, and those of the teacher, ``taught``.
    ``fused_labels``: of one that was to give their log-probabilities alone."""

    inputs: dict[str, Any] | None = None
    outputs: Any = None
    taught: Any = None
    fused_labels: Any = None


class MicroBatches:
    """Holds no state of a run; made once for each ``trainer``, an :class:`~apt_trainer.APTTrainer`.

    Raises:
        UserError: ``compute_loss`` cannot be called as transformers calls it.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer, self._checked, self._computed = trainer, False, 0
        self._label_logits = LabelLogits(trainer)
        self._normalised = trainer.loss_is_scaled_for_ga is True or trainer.compute_loss_func is not None
        trainer.loss_is_scaled_for_ga = True  # by the shares of StepLosses
        try:
            inspect.signature(trainer.compute_loss).bind(None, {}, return_outputs=True, num_items_in_batch=None)
        except TypeError as error:
            raise UserError(
                f"compute_loss of {type(trainer).__name__} cannot be called as transformers does ({error}). Give it "
                "the arguments (self, model, inputs, return_outputs=False, num_items_in_batch=None)."
            ) from error

    @contextmanager
    def wrapped(self) -> Iterator[None]:
        """Within it, the trainer's methods do the method's part too."""
        trainer = self.trainer
        fetch, step = (partial(self._fetch, trainer.get_batch_samples), partial(self._step, trainer.training_step))
        with replaced(trainer, get_batch_samples=fetch, training_step=step):
            yield

    # ------------------------------------------------------------------ the three methods

    def _fetch(self, own: Callable[..., Any], batches: Any, number: int, *args: Any) -> tuple[list[Any], Any]:
        streams = not has_length(self.trainer.train_dataset)
        try:
            fetched, items = own(batches, number, *args)
        except ValueError as error:  # what accelerate makes of a stream that has nothing to give a second time
            if not streams or "does not contain any data" not in str(error):
                raise
            return [], None
        if streams and len(fetched) < number:
            return [], items  # the Trainer would not step on the last, incomplete micro-batches of a stream
        if fetched and not self._checked:
            self._check_names(fetched[0])
        self.trainer.step_losses.begin(fetched, self.trainer.transformer)
        return fetched, items

    def _step(self, own: Callable[..., Any], model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        trainer, self._computed = self.trainer, 0
        trainer.last_inputs = dict(inputs)
        compiled = trainer.compiled.running(trainer.model, trainer.pruner.is_hooked)
        with compiled, replaced(trainer, compute_loss=partial(self._loss, trainer.compute_loss)):
            loss: torch.Tensor = own(trainer.model_wrapped, inputs, *args, **kwargs)
        if self._computed == 0:
            raise UserError(
                f"training_step of {type(trainer).__name__} does not call self.compute_loss, so nothing can be "
                "weighed or distilled. Let it call that, or override compute_loss instead."
            )
        trainer.step_losses.look_at(loss)
        self._checked = True
        return loss

    def _loss(
        self,
        own: Callable[..., Any],
        model: nn.Module,
        inputs: Any,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        trainer, losses = self.trainer, self.trainer.step_losses
        if not (model.training or torch.is_grad_enabled()):
            return own(model, inputs, return_outputs, num_items_in_batch)
        step, inputs = trainer.state.global_step, trainer._prepare_inputs(inputs)
        given, shares = dict(inputs), losses.shares(inputs, trainer.transformer)
        mu = trainer.schedule.mu(step) if trainer.distillation.ready else 0.0
        trainer.pruner.set_tokens(real_tokens(given, trainer.pruner.family))
        counts = self._normalised and num_items_in_batch is None  # else the Trainer has
        num_items_in_batch = losses.labels() if counts else num_items_in_batch
        positions = self._label_logits.positions(given, mu > 0.0)
        losing = nullcontext() if positions is None else positions.of_student(trainer.transformer)
        with self._watched(given, mu > 0.0, positions) as passes, losing:
            result = own(model, inputs, return_outputs, num_items_in_batch)
        seen = passes[0] if passes else Pass()
        loss, outputs = result if isinstance(result, tuple) else (result, seen.outputs)
        self._check_pass(loss, seen)
        if not self._normalised:
            loss = shares.of_task(loss)
        elif counts:
            loss = loss * losses.processes
        parts = {"task_loss": loss}
        if mu > 0.0:
            pruner, known = trainer.pruner, None if positions is None else positions.distance
            alive, family = pruner.plan.alive_layers(pruner.sublayers), pruner.family
            apart = [
                trainer.distillation.loss(
                    one.inputs, one.outputs, one.taught, trainer.transformer, family, alive, step, shares, known
                )
                for one in passes
            ]
            distance = torch.stack(apart).mean()
            parts["distillation_loss"] = distance
            loss = mu * distance + (1 - mu) * loss
        if trainer.args.distillation != "none" and self._computed == 0:
            for name, part in parts.items():
                losses.note(name, part, step)
        self._computed += 1
        self._check_weight(loss)
        return (loss, outputs) if return_outputs else loss

    # ------------------------------------------------------------------ what the student is given and gives

    @contextmanager
    def _watched(
        self, given: Mapping[str, Any], teaches: bool, positions: LabelPositions | None = None
    ) -> Iterator[list[Pass]]:
        """Within it, the first forward pass of the student that trains is seen, and of a transformer inside of the
        model all: one for each text of a row. ``teaches``: the teacher runs before each; not during it, when a
        parameter that the two share can be on its way to the device (ZeRO-3). ``positions``: where alone the two make
        logits."""
        trainer = self.trainer
        passes: list[Pass] = []
        names = _names_of_arguments(type(trainer.transformer))  # type: ignore[arg-type]
        at_hand: Pass | None = None

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            nonlocal at_hand
            if (passes and not trainer.place) or not (torch.is_grad_enabled() and trainer.model.training):
                return None
            called = dict(zip(names, args, strict=False)) | kwargs
            inputs = _with_labels(called, given)
            at_hand = Pass(inputs)
            passes.append(at_hand)
            if any(called.get(name) is not given.get(name) for name in _TOKENS):
                trainer.pruner.set_tokens(real_tokens(inputs, trainer.pruner.family))
            if not teaches:
                return None
            engine_of(trainer).settle()
            with nullcontext() if positions is None else positions.of_teacher():
                at_hand.taught = trainer.distillation.teach(inputs)
            if kwargs.get(FUSED):  # without labels: the loss is the trainer's to compute
                at_hand.fused_labels = called["labels"]
                kwargs = {name: value for name, value in kwargs.items() if name not in (FUSED, "labels")}
            return args, kwargs | ({"output_hidden_states": True} if trainer.distillation.uses_layers else {})

        def after(module: nn.Module, args: tuple[Any, ...], outputs: Any) -> Any:
            nonlocal at_hand
            seen, at_hand = at_hand, None
            if seen is None:
                return None
            seen.outputs = outputs
            return None if seen.fused_labels is None else with_log_probs(outputs, seen.fused_labels)

        if trainer.place:
            with watched_forward(trainer.transformer, before, after):
                yield passes
        else:
            student = trainer.model_wrapped
            handles = [
                student.register_forward_pre_hook(before, prepend=True, with_kwargs=True),  # before an engine's own
                student.register_forward_hook(after),
            ]
            try:
                yield passes
            finally:
                for handle in handles:
                    handle.remove()

    @contextmanager
    def telling_tokens(self, tell: Callable[[Tokens], None], given: Mapping[str, Any]) -> Iterator[None]:
        """Within it, for scoring a model that does not train, each pass of the transformer says which tokens are real,
        where these are not those of the batch ``given``: several texts a row are one batch to it, or, inside of a
        model, one pass each."""
        trainer, ids = self.trainer, given.get("input_ids")
        if not trainer.place and (ids is None or ids.dim() < 3):
            yield
            return
        names = _names_of_arguments(type(trainer.transformer))  # type: ignore[arg-type]

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            called = dict(zip(names, args, strict=False)) | kwargs
            if any(called.get(name) is not given.get(name) for name in _TOKENS):
                tell(real_tokens(called, trainer.pruner.family))

        with watched_forward(trainer.transformer, before):
            yield

    # ------------------------------------------------------------------ errors

    def _check_names(self, batch: Mapping[str, Any]) -> None:
        """Tokens or images must be there, and labels where snapshots are chosen by their loss on held-out rows."""
        trainer = self.trainer
        if not trainer.place and not any(name.endswith(_TOKENS[:3]) for name in batch):  # chosen_input_ids too
            raise UserError(
                f"A batch has no input_ids or pixel_values, but only {', '.join(sorted(batch)) or 'nothing'}. Look at "
                "data_collator and at remove_unused_columns, which takes out what the model's forward does not name."
            )
        chooses = trainer.heldout_dataset is not None and trainer.distillation.settings.distillation == "self"
        missing = [name for name in trainer.label_names if batch.get(name) is None]
        by_labels = trainer.trainer_class.prediction_step in (Trainer.prediction_step, Seq2SeqTrainer.prediction_step)
        unnamed = not (trainer.label_names or trainer.can_return_loss)
        if chooses and by_labels and (missing or unnamed):
            lacking = "names nothing" if unnamed else "are not all"
            raise UserError(
                f"label_names={trainer.label_names} {lacking} in a batch, which has {', '.join(sorted(batch))}; "
                "without them no loss of held-out rows is computed, by which the teacher is chosen. Set label_names "
                "to the labels of the batch, or distillation: none."
            )

    def _check_pass(self, loss: Any, seen: Pass) -> None:
        trainer, name = self.trainer, type(self.trainer).__name__
        if not torch.is_tensor(loss) or loss.numel() != 1 or not loss.requires_grad:
            found = f"a tensor of shape {tuple(loss.shape)}" if torch.is_tensor(loss) else repr(loss)
            raise UserError(
                f"compute_loss of {name} gave {found}, not one number with a gradient. Return a scalar loss, computed "
                "with gradients on."
            )
        if trainer.args.distillation == "none":
            return
        if isinstance(seen.outputs, Mapping):
            if not _COMPARED & seen.outputs.keys():
                raise UserError(
                    f"The model of {name} gives {', '.join(seen.outputs)}, but no logits, which are compared with a "
                    "teacher's. Set distillation: none."
                )
            return
        if seen.inputs is None:
            raise UserError(
                f"compute_loss of {name} does not run the model it is given in training mode with gradients, so there "
                "are no outputs to compare with a teacher's. Call model(**inputs) in it, or set distillation: none."
            )
        raise UserError(
            f"The model gave {type(seen.outputs).__name__} in compute_loss of {name}, but distillation reads outputs "
            "by name. Leave out return_dict=False, or set distillation: none."
        )

    def _check_weight(self, loss: torch.Tensor) -> None:
        """Raise :class:`UserError` where a ``training_step`` divides the loss by the number of micro-batches."""
        trainer, number = self.trainer, self.trainer.current_gradient_accumulation_steps
        if self._checked or number == 1 or type(trainer).training_step is Trainer.training_step:
            return

        def arrives(gradient: torch.Tensor) -> None:
            scaler = getattr(trainer.accelerator, "scaler", None)
            scale = float(gradient) / (1.0 if scaler is None else scaler.get_scale())
            if abs(scale * number - 1.0) < 1e-3:
                raise UserError(
                    f"training_step of {type(trainer).__name__} divides the loss by the {number} micro-batches of a "
                    "step, but each is weighed by its share already. Leave the division out, or call super()."
                )

        loss.register_hook(arrives)


@functools.cache
def _names_of_arguments(kind: Any) -> list[str]:
    return list(inspect.signature(kind.forward).parameters)[1:]


def _with_labels(called: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Inputs of a forward pass, with the ``labels`` of the batch where the caller has taken them out and they fit."""
    inputs = {name: value for name, value in called.items() if name not in _NO_DATA and value is not None}
    sizes = [[batch[name].shape[:2] for name in _TOKENS if batch.get(name) is not None] for batch in (inputs, given)]
    if "labels" not in inputs and given.get("labels") is not None and sizes[0] == sizes[1]:
        inputs["labels"] = given["labels"]
    return inputs
