"""Passes over rows of the training data that are no training: they score a model, or show what its weights read.

Which rows is a matter of the seed alone, so that a resumed run and any number of processes see the same ones.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from transformers.trainer_utils import has_length

from apt_trainer.scoring.base import Batch
from apt_trainer.scoring.calibration import shares
from apt_trainer.training.own_metrics import left_alone
from apt_trainer.training.trainer_class import overrides


class CalibrationRows:
    """``calibration_samples`` rows of the data of ``trainer``, which makes batches of them and computes its loss."""

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Passes within it leave no trace in what the trainer logs or draws at random afterwards."""
        with left_alone(self._trainer), torch.random.fork_rng(devices=[]):
            yield

    def batches(self) -> Iterator[Batch | None]:
        """This process' share; None where its rows have run out, but not those of others."""
        trainer, args, data = self._trainer, self._trainer.args, self._trainer.train_dataset
        if not has_length(data):
            data = list(itertools.islice(data, args.calibration_samples))
        collate = trainer.data_collator
        if not overrides(trainer.trainer_class, "get_train_dataloader"):
            collate = trainer._get_collator_with_removed_columns(collate, "Calibration")
        size = args.calibration_batch_size or args.train_batch_size
        for rows in shares(len(data), args.calibration_samples, size, args.seed, args.process_index, args.world_size):
            yield trainer._prepare_inputs(collate([data[row] for row in rows])) if rows else None

    def loss_of(self, batch: Batch) -> torch.Tensor:
        """Task loss of the plain model. Gradients in float16 would need the scaler of accelerate."""
        trainer = self._trainer
        autocast = nullcontext() if trainer.args.fp16 else trainer.accelerator.autocast()
        with autocast, trainer.micro_batches.telling_tokens(trainer.pruner.set_scored_tokens, batch):
            return trainer.compute_loss(trainer.model, dict(batch))  # type: ignore[no-any-return]
