"""Evaluation that counts each row once, however many processes share the rows, and the weights of labels in the loss.

Not for what is measured: metrics are a task's (``tasks``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel, Seq2SeqTrainer, TrainingArguments

from apt_trainer.errors import UserError
from apt_trainer.models.class_weights import ClassWeights, check_smoothing
from apt_trainer.models.labels import IMAGE_HEAD, SEQUENCE_HEAD, head_of, problem_type

if TYPE_CHECKING:
    from transformers import Trainer as Mixin
else:
    Mixin = object
"""What the parts of the method derive from: each stands before a Trainer, of any class, in the order of bases."""


class EachRowOnce(Mixin):
    """Leaves out of metrics and loss the rows that fill up the last batch of several processes. ``Seq2SeqTrainer``
    counts them in both, ``Trainer`` in the loss, so that a run would choose another teacher with more processes.

    Losses are means over a batch. The Trainer thinks of any model whose ``forward`` has ``**kwargs`` that its loss is
    a sum divided by ``num_items_in_batch``; accumulation and processes then multiply the losses of the many that take
    no notice of that number (those of BERT and T5, all sequence classifiers).

    ``class_weights``: what each label counts in the loss, a mean over the weights of all rows, whatever the batches.
    """

    def __init__(self, *args: Any, class_weights: Sequence[float] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = False
        self._loaders: dict[int, tuple[Any, Any]] = {}  # id of data → the data, so that it stays theirs, and a loader
        self.class_weights = None if class_weights is None else ClassWeights(class_weights)
        if self.class_weights is not None:
            self.class_weights.check(self.model)
            if self.compute_loss_func is not None:
                raise UserError("class_weights and compute_loss_func both make the loss. Give one of them.")
        problem = problem_type(self.model.config) if head_of(self.model) in (SEQUENCE_HEAD, IMAGE_HEAD) else None
        check_smoothing(self.args.label_smoothing_factor, problem, self.class_weights is not None)
        self._weighed = torch.zeros(2)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """As the Trainer's, which keeps one loader, whatever the data, where workers are persistent: here one each.
        Those of sentence-transformers drop rows of evaluations too where ``dataloader_drop_last`` is set."""
        drops, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            return self._eval_loader(eval_dataset)
        finally:
            self.args.dataloader_drop_last = drops

    def _eval_loader(self, eval_dataset: Any) -> Any:
        if not self.args.dataloader_persistent_workers:
            return super().get_eval_dataloader(eval_dataset)
        key = eval_dataset if isinstance(eval_dataset, str) else "eval"
        data = self.eval_dataset if eval_dataset is None else eval_dataset
        data = self.eval_dataset[data] if isinstance(data, str) else data
        kept = getattr(self, "_eval_dataloaders", {})
        kept.pop(key, None)
        if id(data) in self._loaders:
            kept[key] = self._loaders[id(data)][1]
        loader = super().get_eval_dataloader(eval_dataset)
        self._loaders[id(data)] = data, loader
        return loader

    def _get_dataloader(self, *args: Any, is_training: bool = False, **kwargs: Any) -> Any:
        """As the Trainer's, which drops rows of evaluations too where ``dataloader_drop_last`` is set."""
        drops = self.args.dataloader_drop_last
        self.args.dataloader_drop_last = drops and is_training
        try:
            return super()._get_dataloader(*args, is_training=is_training, **kwargs)
        finally:
            self.args.dataloader_drop_last = drops

    def evaluation_order(self, rows: Any) -> list[int] | None:
        """Which of ``rows`` each prediction of an evaluation is of, where that is not their order: the Trainer also
        sorts them by length where it groups training rows by it."""
        grouped = self.args.train_sampling_strategy == "group_by_length"
        return list(self._get_eval_sampler(rows)) if grouped else None

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        if self.class_weights is None or "labels" not in inputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        _, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        loss = self.class_weights.loss(outputs["logits"], inputs["labels"])
        return (loss, outputs) if return_outputs else loss

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        gather = self.accelerator.gather_for_metrics
        self.gather_function = partial(gather, use_gather_object=self.args.eval_use_gather_object)
        self._weighed = torch.zeros(2, device=self.args.device)
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        if self.class_weights is not None and f"{metric_key_prefix}_loss" in output.metrics:
            weights, rows = self.accelerator.reduce(self._weighed, reduction="sum").tolist()
            output.metrics[f"{metric_key_prefix}_loss"] *= rows / weights if weights else math.nan
        return output

    def prediction_step(
        self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, *args: Any, **kwargs: Any
    ) -> Any:
        loss, logits, labels = super().prediction_step(model, inputs, prediction_loss_only, *args, **kwargs)
        rows = self._rows_of_last_batch()
        if rows is not None and loss is not None:  # on all processes, whatever their number of rows
            inputs = _first(rows, inputs)
            loss = super().prediction_step(model, inputs, True)[0]
        if self.class_weights is not None and loss is not None and "labels" in inputs:
            loss = self._sum_of_rows(loss, self._prepare_inputs(inputs)["labels"], rows)
        return loss, logits, labels

    def _sum_of_rows(self, loss: torch.Tensor, labels: torch.Tensor, rows: int | None) -> torch.Tensor:
        """The weighed ``loss`` of a batch as what its rows add to the sum over all, by row; ``rows``: how many of them
        count, None: all."""
        assert self.class_weights is not None
        weights, number = self.class_weights.total(labels), len(labels)
        if rows != 0:
            self._weighed += torch.stack([weights, torch.full_like(weights, number)])
        return torch.where(weights == 0, 0.0, loss * weights / number)

    def _rows_of_last_batch(self) -> int | None:
        """How many rows of the batch at hand are this process' own; None where all are on every process."""
        state, size = self.accelerator.gradient_state, self.args.eval_batch_size
        if self.args.world_size == 1 or not state.end_of_dataloader or state.remainder <= 0:
            return None
        return min(size, max(0, state.remainder - size * self.args.process_index))


def _first(rows: int, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The first ``rows`` of a batch, one at least: without its own rows, the loss of a process does not count."""
    parted = (torch.Tensor, list)  # those of a cross-encoder are texts
    return {name: value[: max(1, rows)] if isinstance(value, parted) else value for name, value in inputs.items()}


def plain_trainer(model: PreTrainedModel, args: TrainingArguments, **kwargs: Any) -> Seq2SeqTrainer:
    """A trainer without the method, for evaluating a finished model."""
    return _PlainTrainer(model, args, **kwargs)


class _PlainTrainer(EachRowOnce, Seq2SeqTrainer):
    """Evaluates as a trainer with the method does."""
