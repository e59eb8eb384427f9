"""The method's settings on top of the training arguments of a Trainer: ``APTConfig``, and those of any other class.

Validation of the method happens in ``settings``; this file only joins the two and changes a few defaults.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from functools import cache
from typing import TYPE_CHECKING, Any

from transformers import Seq2SeqTrainingArguments

from apt_trainer.errors import UserError
from apt_trainer.settings import LoopSettings, MeasureSettings, MethodSettings
from apt_trainer.settings.engines import before_processes_join, check_deepspeed, join_processes
from apt_trainer.settings.fsdp import check_fsdp
from apt_trainer.settings.packages import check_packages
from apt_trainer.settings.refused import check_refused

_FROM_1, _FROM_0, _SHARE = (1, math.inf, "at least 1"), (0, math.inf, "at least 0"), (0, 1, "from 0 to below 1")
_RANGES: dict[str, tuple[float, float, str]] = {
    "per_device_train_batch_size": _FROM_1,
    "per_device_eval_batch_size": _FROM_1,
    "gradient_accumulation_steps": _FROM_1,
    "eval_accumulation_steps": _FROM_1,
    "save_total_limit": (1, math.inf, "at least 1; null keeps all checkpoints"),
    "dataloader_num_workers": _FROM_0,
    "weight_decay": _FROM_0,
    "warmup_steps": (0, math.inf, "a number of steps, or a fraction of all steps"),
    "max_grad_norm": (0, math.inf, "at least 0; 0 does not clip"),
    "adam_beta1": _SHARE,
    "adam_beta2": _SHARE,
    "label_smoothing_factor": _SHARE,
    "seed": (0, 2**32, "from 0 to 2**32 - 1"),
    "data_seed": (0, 2**32, "from 0 to 2**32 - 1"),
}
"""Numbers of the training loop: the least allowed, the first that is too large, and both in words."""

_WATCHED = ("metric_for_best_model", "greater_is_better")
"""What says which model is the best; ``watch_given`` of arguments: those of them that were given, not filled in."""

if TYPE_CHECKING:
    from transformers import TrainingArguments as _JoinedLater
else:
    _JoinedLater = object


@dataclass
class PruningArguments(MethodSettings, LoopSettings, _JoinedLater):
    """Settings of the method, to be joined with a class of training arguments: see :func:`joined`.

    Defaults that differ from ``TrainingArguments``: ``learning_rate`` 2e-4 (5e-5), since adapters train,
    ``hub_strategy`` "end" ("every_save"), ``logging_nan_inf_filter`` False (True), since a loss that is not a number
    must stop the run, and ``ddp_find_unused_parameters`` False (True for most models), since the distillation
    transform is used outside the wrapped forward and would be taken for unused.
    """

    learning_rate: float = field(
        default=2e-4, metadata={"help": "Peak learning rate of adapters and head. 2e-4 (APT)."}
    )
    hub_strategy: str = field(
        default="end", metadata={"help": "end: with push_to_hub, the finished model is uploaded, once."}
    )
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Hide losses that are not finite from logs."}
    )
    ddp_find_unused_parameters: bool | None = field(default=False, metadata={"help": "As TrainingArguments."})

    def __post_init__(self) -> None:
        self.check()
        self.check_loop()
        self._check_numbers()
        self.watch_given: tuple[str, ...] = tuple(name for name in _WATCHED if getattr(self, name, None) is not None)
        if self.early_stopping_patience is not None and getattr(self, "metric_for_best_model", None) is None:
            self.metric_for_best_model = "loss"
        check_packages({"deepspeed": self.deepspeed})
        before_processes_join(self)
        join_processes(self)
        super().__post_init__()
        check_deepspeed(self)
        check_fsdp(self)
        check_refused(self)
        if self.early_stopping_patience is not None and self.eval_strategy == "no":
            raise UserError(
                "early_stopping_patience needs evaluations during training, but eval_strategy is no. Set "
                "eval_strategy: epoch, or steps with eval_steps."
            )
        if self.device.type == "cpu":
            self.dataloader_pin_memory = False  # would only warn
        if self.logging_nan_inf_filter:
            raise UserError(
                "logging_nan_inf_filter hides losses that are not finite; they must stop the run. Remove it."
            )

    def _check_numbers(self) -> None:
        """Raise :class:`UserError` for numbers of the loop that it would stumble over."""
        for each in fields(self):
            value = getattr(self, each.name)
            if isinstance(value, float) and not math.isfinite(value):
                raise UserError(f"{each.name}={value} is not a finite number.")
        for name, (least, above, meaning) in _RANGES.items():
            value = getattr(self, name)
            if value is not None and not least <= value < above:
                raise UserError(f"{name}={value} must be {meaning}.")
        for name in ("logging_steps", "eval_steps", "save_steps"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UserError(f"{name}={value} must be a number of steps from 1, or a fraction of all steps.")
        for name in ("learning_rate", "full_learning_rate", "dense_learning_rate"):
            value = getattr(self, name, None)
            if value is not None and not value > 0:
                raise UserError(f"{name}={value} must be above 0.")
        if self.max_steps != -1 and self.max_steps < 1:
            raise UserError(f"max_steps={self.max_steps} must be at least 1; -1 trains for num_train_epochs.")
        if self.num_train_epochs <= 0 and self.max_steps == -1:
            raise UserError(f"num_train_epochs={self.num_train_epochs} must be above 0.")

    def total_steps(self, num_rows: int | None) -> int:
        """Optimizer steps of a run over ``num_rows`` training rows, counted as the Trainer does; None: not known.

        Raises :class:`UserError` where neither rows nor ``max_steps`` tell.
        """
        if num_rows is None:
            if self.max_steps <= 0:
                raise UserError("The training data have no length, so max_steps has to say how long to train.")
            return int(self.max_steps)
        whole = math.floor if self.dataloader_drop_last else math.ceil
        processes = 1 if self.accelerator_config.split_batches else self.world_size
        if self.train_sampling_strategy == "batch_rebalance":
            per_epoch = whole(num_rows / (self.train_batch_size * processes * self.gradient_accumulation_steps))
        else:
            batches = whole(num_rows / (self.train_batch_size * processes))
            per_epoch = math.ceil(batches / self.gradient_accumulation_steps)
        if per_epoch == 0:
            raise UserError(
                f"{num_rows} training rows make no whole batch of {self.train_batch_size * processes}, and "
                "dataloader_drop_last drops the rest. Lower per_device_train_batch_size, or do not drop it."
            )
        return int(self.max_steps) if self.max_steps > 0 else math.ceil(per_epoch * self.num_train_epochs)

    def heldout_rows(self, num_rows: int) -> int:
        """Rows of the training data on which snapshots of the student are chosen as teacher."""
        return (
            max(1, math.ceil(num_rows * self.heldout_fraction)) if self.distillation == "self" and self.prunes else 0
        )


@dataclass
class APTConfig(PruningArguments, MeasureSettings, Seq2SeqTrainingArguments):
    """Settings of one run: every field of ``settings.MethodSettings``, ``settings.MeasureSettings`` and
    ``transformers.Seq2SeqTrainingArguments``.

    Defaults that differ from ``TrainingArguments``: those of :class:`PruningArguments`, ``warmup_steps`` 0.06 of all
    steps (0), ``save_strategy`` "no" ("steps") and ``logging_steps`` 50 (500).
    """

    warmup_steps: float = field(default=0.06, metadata={"help": "Steps, or a fraction of all steps. 0.06 (official)."})
    logging_steps: float = field(default=50, metadata={"help": "Steps between log lines."})
    save_strategy: str = field(
        default="no", metadata={"help": "no, steps, epoch or best: when checkpoints are written."}
    )

    def __post_init__(self) -> None:
        self.check_measuring()
        super().__post_init__()
        if self.reference_metric is not None and self.eval_strategy == "no":
            raise UserError(
                "reference_metric needs evaluations during training, but eval_strategy is no. Set eval_strategy: "
                "epoch, or steps with eval_steps."
            )


@cache
def joined(arguments: type[Any]) -> type[PruningArguments]:
    """Class of settings that has all of the method's and all of ``arguments``, a class of training arguments."""

    def __reduce_ex__(self: Any, protocol: Any) -> tuple[Any, ...]:
        return _empty, (arguments,), vars(self)

    description = f"Every field of ``{arguments.__name__}`` and of ``settings.MethodSettings``."
    namespace = {"__doc__": description, "__module__": __name__, "__reduce_ex__": __reduce_ex__}
    return dataclass(type(f"Pruning{arguments.__name__}", (PruningArguments, arguments), namespace))


def _empty(arguments: type[Any]) -> PruningArguments:
    """What a pickled object of :func:`joined` is made of."""
    kind: Any = joined(arguments)  # type: ignore[arg-type]
    return kind.__new__(kind)  # type: ignore[no-any-return]
