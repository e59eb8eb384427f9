"""``APTConfig``: the method's settings on top of Hugging Face ``TrainingArguments``.

Validation of the method happens in ``settings``; this file only joins the two and changes a few defaults.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields

from transformers import Seq2SeqTrainingArguments

from apt_trainer.errors import UserError
from apt_trainer.settings import MeasureSettings, MethodSettings
from apt_trainer.settings.engines import before_processes_join, check_deepspeed, join_processes
from apt_trainer.settings.fsdp import check_fsdp


@dataclass
class APTConfig(MethodSettings, MeasureSettings, Seq2SeqTrainingArguments):
    """Settings of one run: every field of ``settings.MethodSettings``, ``settings.MeasureSettings`` and
    ``transformers.Seq2SeqTrainingArguments``.

    Defaults that differ from ``TrainingArguments``: ``learning_rate`` 2e-4 (5e-5), ``warmup_steps`` 0.06 of all steps
    (0), ``save_strategy`` "no" ("steps"), ``logging_nan_inf_filter`` False (True), since a loss that is not a number
    must stop the run, ``logging_steps`` 50 (500), and ``ddp_find_unused_parameters`` False (True for most models),
    since the distillation transform is used outside the wrapped forward and would be taken for unused.
    """

    learning_rate: float = field(
        default=2e-4, metadata={"help": "Peak learning rate of adapters and head. 2e-4 (APT)."}
    )
    warmup_steps: float = field(default=0.06, metadata={"help": "Steps, or a fraction of all steps. 0.06 (official)."})
    logging_steps: float = field(default=50, metadata={"help": "Steps between log lines."})
    save_strategy: str = field(
        default="no", metadata={"help": "no, steps, epoch or best: when checkpoints are written."}
    )
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Hide losses that are not finite from logs."}
    )

    ddp_find_unused_parameters: bool | None = field(default=False, metadata={"help": "As TrainingArguments."})

    def __post_init__(self) -> None:
        self.check()
        self.check_measuring()
        self._check_numbers()
        before_processes_join(self)
        join_processes(self)
        super().__post_init__()
        check_deepspeed(self)
        check_fsdp(self)
        if self.device.type == "cpu":
            self.dataloader_pin_memory = False  # would only warn
        if self.logging_nan_inf_filter:
            raise UserError(
                "logging_nan_inf_filter hides losses that are not finite; they must stop the run. Remove it."
            )
        if self.reference_metric is not None and self.eval_strategy == "no":
            raise UserError(
                "reference_metric needs evaluations during training, but eval_strategy is no. Set eval_strategy: "
                "epoch, or steps with eval_steps."
            )

    def _check_numbers(self) -> None:
        """Raise :class:`UserError` for numbers of the loop that it would stumble over."""
        for each in fields(self):
            value = getattr(self, each.name)
            if isinstance(value, float) and not math.isfinite(value):
                raise UserError(f"{each.name}={value} is not a finite number.")
        for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be at least 1.")
        for name in ("learning_rate", "full_learning_rate", "dense_learning_rate"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UserError(f"{name}={value} must be above 0.")
        if self.num_train_epochs <= 0 and self.max_steps <= 0:
            raise UserError(f"num_train_epochs={self.num_train_epochs} must be above 0.")

    def total_steps(self, num_rows: int) -> int:
        """Optimizer steps of a run over ``num_rows`` training rows, counted as the Trainer does."""
        if self.max_steps > 0:
            return int(self.max_steps)
        batches = math.ceil(num_rows / (self.train_batch_size * self.world_size))
        per_epoch = max(1, math.ceil(batches / self.gradient_accumulation_steps))
        return math.ceil(per_epoch * self.num_train_epochs)

    def heldout_rows(self, num_rows: int) -> int:
        """Rows of the training data on which snapshots of the student are chosen as teacher."""
        return (
            max(1, math.ceil(num_rows * self.heldout_fraction)) if self.distillation == "self" and self.prunes else 0
        )
