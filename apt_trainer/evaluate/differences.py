"""For which test rows a pruned model says something else than the dense one: what both say of each row, side by side.

For models that give each row labels or numbers; other tasks sum what they measure, and keep nothing of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import EvalPrediction

from apt_trainer.models.labels import MULTI_LABEL, REGRESSION
from apt_trainer.store.events import DIFFERENCES_FILE, PREDICTIONS_FILE, read_json_object, write_json
from apt_trainer.tasks import TaskData
from apt_trainer.tasks.base import first_output

KEPT = 20_000  # rows of which the prediction is written
SHOWN = 100  # rows that are told with their text
CHARACTERS = 400  # of a text


def keep_predictions(
    folder: Path,
    dense: Path,
    data: TaskData,
    tokenizer: Any,
    predictions: Sequence[EvalPrediction],
    order: Callable[[], Sequence[int] | None] = lambda: None,
) -> None:
    """Keep what a model says of the test rows in the folder of its run, and where the dense model, whose run is in
    ``dense``, says something else; what an earlier run has kept there goes. Nothing for other tasks.

    ``order``: which row each prediction is of; None: the first is of the first row.
    """
    for name in (DIFFERENCES_FILE, PREDICTIONS_FILE):
        (folder / name).unlink(missing_ok=True)
    if data.model_class != "AutoModelForSequenceClassification":
        return
    for prediction in predictions:
        write_predictions(folder, data, tokenizer, prediction, order())
        write_differences(folder, dense, data, tokenizer)


def write_predictions(
    folder: Path, data: TaskData, tokenizer: Any, prediction: EvalPrediction, order: Sequence[int] | None
) -> None:
    """Write what the model says of the first rows of the test data, and what is right. ``example``: of the first row,
    with its text; ``order`` as of :func:`keep_predictions`."""
    rows = min(len(data.test), KEPT)
    problem, names = data.model_kwargs["problem_type"], data.label_names
    first = slice(rows) if order is None else np.argsort(order)[:rows]
    said, right = np.asarray(first_output(prediction.predictions))[first], np.asarray(prediction.label_ids)[first]
    if problem == REGRESSION:
        both = [values.reshape(rows, -1).astype(float).round(6).tolist() for values in (said, right)]
    elif problem == MULTI_LABEL:
        both = [[_names(row, names) for row in values.tolist()] for values in (said > 0, right > 0.5)]
    else:
        both = [[names[i] for i in values.tolist()] for values in (said.argmax(-1), right)]
    example = {"text": _text(data, tokenizer, 0), "prediction": _shown(both[0][0]), "label": _shown(both[1][0])}
    found = {"of": len(data.test), "example": example, "prediction": both[0], "label": both[1]}
    write_json(folder / PREDICTIONS_FILE, found)


def write_differences(folder: Path, dense: Path, data: TaskData, tokenizer: Any) -> None:
    """Compare what two runs wrote by :func:`write_predictions` on the same data; nothing where one did not.

    ``differences.json``: how many ``rows`` were compared, on how many the two ``differ`` and who is right on those
    (for numbers: whose are nearer), and ``examples`` with their text as the model reads it, those first that only the
    dense model has right; of numbers the most distant.
    """
    if not ((folder / PREDICTIONS_FILE).is_file() and (dense / PREDICTIONS_FILE).is_file()):
        return
    ours, theirs = read_json_object(folder / PREDICTIONS_FILE), read_json_object(dense / PREDICTIONS_FILE)
    if ours["label"] != theirs["label"]:
        return
    labels, pruned, full = ours["label"], ours["prediction"], theirs["prediction"]
    numbers = data.model_kwargs["problem_type"] == REGRESSION
    rows = [row for row in range(len(labels)) if pruned[row] != full[row]]
    who = {row: _who(full[row], pruned[row], labels[row], numbers) for row in rows}
    if numbers:
        rows.sort(key=lambda row: -_distance(full[row], pruned[row]))
    else:
        rows.sort(key=lambda row: ("dense", "neither", "pruned").index(who[row]))
    examples = [
        {
            "row": row,
            "text": _text(data, tokenizer, row),
            "label": _shown(labels[row]),
            "dense": _shown(full[row]),
            "pruned": _shown(pruned[row]),
            "right": who[row],
        }
        for row in rows[:SHOWN]
    ]
    counts = {name: sum(value == name for value in who.values()) for name in ("dense", "pruned", "neither")}
    found = {"rows": len(labels), "of": ours["of"], "differ": len(rows), "right": counts, "numbers": numbers}
    write_json(folder / DIFFERENCES_FILE, found | {"examples": examples})


def _who(dense: Any, pruned: Any, label: Any, numbers: bool) -> str:
    """Which of two that differ is right: "dense", "pruned" or "neither"."""
    if numbers:
        return "dense" if _distance(dense, label) < _distance(pruned, label) else "pruned"
    return "dense" if dense == label else "pruned" if pruned == label else "neither"


def _distance(a: Sequence[float], b: Sequence[float]) -> float:
    return sum(abs(x - y) for x, y in zip(a, b, strict=True))


def _names(hot: Sequence[bool], names: Sequence[str]) -> list[str]:
    return [name for name, on in zip(names, hot, strict=True) if on]


def _shown(value: Any) -> str:
    if not isinstance(value, list):
        return str(value)
    return ", ".join(f"{one:.4g}" if isinstance(one, float) else str(one) for one in value) or "none"


def _text(data: TaskData, tokenizer: Any, row: int) -> str:
    """What the model reads of a row: the beginning of a long text."""
    text = str(tokenizer.decode(data.test[row]["input_ids"], skip_special_tokens=True)).strip()
    return text if len(text) <= CHARACTERS else text[:CHARACTERS].rstrip() + " …"
