"""Which runs of a study need what other runs of it save, such as a teacher or a model. Starts nothing."""

from __future__ import annotations

import os
from collections.abc import Sequence
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

from apt_trainer.errors import UserError
from apt_trainer.studies.ablation.study import Run, Study

INPUTS = ("teacher_name_or_path", "model_name_or_path", "tokenizer_name_or_path")
_OF_OTHER_VERBS = ("model", "scores", "full", "drop_list")


def name_of(run: Run) -> str:
    return f"{run.variant}, seed {run.seed}"


def find_needs(study: Study) -> dict[Run, list[Run]]:
    """For each run the others of the study whose folder it reads from.

    Raises:
        UserError: runs that need each other, or a run that needs itself.
    """
    needs = {run: _needed(run, study.runs) for run in study.runs}
    try:
        TopologicalSorter(needs).prepare()
    except CycleError as error:
        runs = " → ".join(name_of(run) for run in reversed(error.args[1]))
        raise UserError(
            f"{study.path}: each of these runs needs the next one's result first: {runs}. Name another folder in "
            f"{' or '.join(INPUTS[:2])} of one of them."
        ) from error
    return needs


def _needed(run: Run, runs: Sequence[Run]) -> list[Run]:
    named = [_place(value) for value in map(run.given.get, (*INPUTS, *_OF_OTHER_VERBS)) if isinstance(value, str)]
    return [other for other in runs if any(path.is_relative_to(_place(other.folder)) for path in named)]


def _place(path: str | Path) -> Path:
    return Path(os.path.abspath(os.path.expanduser(path)))
