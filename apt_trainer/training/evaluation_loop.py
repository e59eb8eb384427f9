"""Evaluation that counts each row once, however many processes share the rows.

Not for what is measured: metrics are a task's (``tasks``).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel, Seq2SeqTrainer, TrainingArguments


class EachRowOnce(Seq2SeqTrainer):
    """Leaves out of metrics and loss the rows that fill up the last batch of several processes. ``Seq2SeqTrainer``
    counts them in both, ``Trainer`` in the loss, so that a run would choose another teacher with more processes.

    Losses are means over a batch. The Trainer thinks of any model whose ``forward`` has ``**kwargs`` that its loss is
    a sum divided by ``num_items_in_batch``; accumulation and processes then multiply the losses of the many that take
    no notice of that number (those of BERT and T5, all sequence classifiers).
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = False

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        gather = self.accelerator.gather_for_metrics
        self.gather_function = partial(gather, use_gather_object=self.args.eval_use_gather_object)
        return super().evaluation_loop(*args, **kwargs)

    def prediction_step(
        self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, *args: Any, **kwargs: Any
    ) -> Any:
        loss, logits, labels = super().prediction_step(model, inputs, prediction_loss_only, *args, **kwargs)
        rows = self._rows_of_last_batch()
        if rows is not None and loss is not None:  # on all processes, whatever their number of rows
            loss = super().prediction_step(model, _first(rows, inputs), True)[0]
        return loss, logits, labels

    def _rows_of_last_batch(self) -> int | None:
        """How many rows of the batch at hand are this process' own; None where all are on every process."""
        state, size = self.accelerator.gradient_state, self.args.eval_batch_size
        if self.args.world_size == 1 or not state.end_of_dataloader or state.remainder <= 0:
            return None
        return min(size, max(0, state.remainder - size * self.args.process_index))


def _first(rows: int, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The first ``rows`` of a batch, one at least: without its own rows, the loss of a process does not count."""
    return {name: value[: max(1, rows)] if torch.is_tensor(value) else value for name, value in inputs.items()}


def plain_trainer(model: PreTrainedModel, args: TrainingArguments, **kwargs: Any) -> Seq2SeqTrainer:
    """A trainer without the method, for evaluating a finished model."""
    return EachRowOnce(model, args, **kwargs)
