"""``APTConfig``: the method's settings on top of Hugging Face ``TrainingArguments``.

Validation of the method happens in ``settings``; this file only joins the two and changes a few defaults.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from transformers import Seq2SeqTrainingArguments

from apt_trainer.errors import UserError
from apt_trainer.settings import MeasureSettings, MethodSettings


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

    def __post_init__(self) -> None:
        self.check()
        if self.ddp_find_unused_parameters is None:
            self.ddp_find_unused_parameters = False
        super().__post_init__()
        if self.logging_nan_inf_filter:
            raise UserError(
                "logging_nan_inf_filter hides losses that are not finite; they must stop the run. Remove it."
            )
