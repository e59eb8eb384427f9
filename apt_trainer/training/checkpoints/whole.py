"""Checkpoints appear as a whole, and one that is whole is found again.

Each is written under another name and renamed once every process has written its part.
"""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

from torch import nn
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from apt_trainer.errors import UserError
from apt_trainer.store.saving import STAGING
from apt_trainer.training.checkpoints.state import TRAINER_STATE_NAME, check_complete
from apt_trainer.training.evaluation_loop import EachRowOnce

STAGED = f"{STAGING}checkpoint"
"""Folder in the output folder in which a checkpoint is written."""
GOES_ON = "resume_from_checkpoint: auto, which goes on from the last checkpoint and begins anew where there is none"
"""The one way out of a run that was ended, wherever it was."""
_log = logging.getLogger(__name__)


def checkpoints_in(output: Path) -> list[Path]:
    """Checkpoints in ``output``, whole or not, the latest first."""
    found = [path for path in output.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.is_dir() and _step(path) is not None]
    return sorted(found, key=lambda path: -(_step(path) or 0))


def find_whole(output: Path) -> Path | None:
    """The last checkpoint that is whole; others are named in the log."""
    for path in checkpoints_in(output):
        try:
            check_complete(path)
            return path
        except UserError as error:
            _log.warning("%s It is passed over.", error)
    return None


def last_whole(output: Path) -> Path:
    """As :func:`find_whole`; raises :class:`UserError` where there is none."""
    found = find_whole(output)
    if found is not None:
        return found
    which = "no checkpoint that is whole" if checkpoints_in(output) else "no checkpoint"
    raise UserError(f"resume_from_checkpoint is set, but {output} holds {which}. To begin, set {GOES_ON}.")


def _step(path: Path) -> int | None:
    number = path.name.rpartition("-")[2]
    return int(number) if number.isdigit() else None


class WholeCheckpoints(EachRowOnce):
    """Saves as the Trainer does, but a checkpoint is there with all its files or not at all, and an older one is only
    removed after that; goes on from the last whole one."""

    accelerator: Any
    state: TrainerState
    _staged: Path | None = None

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        if resume_from_checkpoint is True:
            resume_from_checkpoint = str(last_whole(Path(str(self.args.output_dir))))
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staged or super()._get_output_dir(trial))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        output, step = Path(super()._get_output_dir(trial)), self.state.global_step
        name, staged = f"{PREFIX_CHECKPOINT_DIR}-{step}", output / STAGED
        if self.args.should_save:
            shutil.rmtree(staged, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._staged, complete = staged, False
        try:
            super()._save_checkpoint(model, trial)
            complete = True
        finally:
            self._staged = None
            if not complete:
                shutil.rmtree(staged, ignore_errors=True)
        best = f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}"
        if best == name or (output / best).is_dir():
            self.state.best_model_checkpoint = str(output / best)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            self.state.save_to_json(str(staged / name / TRAINER_STATE_NAME))  # once more, with the name to come
            _put(staged / name, output / name)
            rotate_checkpoints(
                str(output), self.args.save_total_limit, self.state.best_model_checkpoint, use_mtime=True
            )


def _put(staged: Path, final: Path) -> None:
    """Rename ``staged`` to ``final``, in the place of what is there, and remove the folder it was in."""
    if final.exists():
        final.rename(staged.parent / "replaced")
    staged.rename(final)
    shutil.rmtree(staged.parent)
