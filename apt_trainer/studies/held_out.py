"""A smaller model beside the one it was made from: on held-out data, on tasks, in speed; for ``metrics.json``.

Not for choosing what goes, which is done on calibration data (``drop``), nor for saved models (``evaluate``,
``benchmark``).
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from apt_trainer.errors import UserError
from apt_trainer.evaluate.bootstrap import mean_interval
from apt_trainer.evaluate.harness import TaskOptions, check_tasks, not_a_language_model
from apt_trainer.evaluate.quantization import quantize
from apt_trainer.measure.likelihood import bounded_exp
from apt_trainer.scoring.sublayers.loss import loss_name, loss_sums
from apt_trainer.scoring.sublayers.windows import Calibration
from apt_trainer.settings.packages import check_packages
from apt_trainer.studies.inputs import DataRequest, Loaded
from apt_trainer.studies.metrics import sdr, sdr_relative
from apt_trainer.studies.plan_scores import measured
from apt_trainer.studies.speed import relative_speed

Scores = dict[str, Any]


@dataclass(frozen=True)
class HeldOutRequest(TaskOptions):
    """What to measure besides tasks: ``test``, held-out data; ``speed`` of both models. ``quantize``: a form of
    ``evaluate.quantization`` that the smaller model takes before it is measured. ``full``: a ``metrics.json`` of an
    earlier drop from this model, measured on the same, whose scores of the full model are taken."""

    test: DataRequest | None = None
    speed: bool = False
    quantize: str | None = None
    full: str | None = None

    @property
    def asks(self) -> bool:
        """Whether anything is to be measured."""
        return self.test is not None or bool(self.tasks) or self.speed


class HeldOut:
    """Measures ``at.model`` twice: as it is, then as what was made of it.

    Raises :class:`UserError` for what cannot be measured, before weights are needed.
    """

    def __init__(self, at: Loaded, request: HeldOutRequest) -> None:
        self._at, self._request = at, request
        if request.quantize is not None and not request.asks:
            raise UserError("quantize goes with what is measured: test, tasks of lm_eval or speed. Give one of them.")
        check_packages({"quantize": request.quantize, "lm_eval_tasks": request.tasks})
        self._test: Calibration | None = None if request.test is None else at.read(request.test)
        if self._test is not None and not self._test.has_labels:
            raise no_loss_on_text(at)
        if request.tasks:
            if not at.model.can_generate():
                raise not_a_language_model(type(at.model).__name__)
            check_tasks(request.tasks, request.task_path)
        self._measured_on = self._describe()
        self._dense: Scores = {} if request.full is None else self._read(request.full)
        self._full: Any = None

    def see_full(self) -> None:
        """Measure the full model."""
        self._dense = self._dense or self._scores()
        if self._request.speed:
            self._full = copy.deepcopy(self._at.model)

    def metrics(self) -> dict[str, Any]:
        """Measure what ``at.model`` is now.

        Returns:
            ``perplexity`` (``exp_loss`` of other heads), ``tasks`` by name and ``accuracy``, their mean: each
            ``value`` with the ends ``low`` and ``high`` of its 95 % interval, and of the full model under ``dense``;
            ``speedup`` as :func:`~apt_trainer.studies.speed.relative_speed`, ``timed_on``, the device, ``sdr`` and
            ``sdr_relative``;
            ``quantised``; ``measured_on``, what the scores are of. As far as asked for.
        """
        found: dict[str, Any] = {"measured_on": self._measured_on} if self._request.asks else {}
        if self._request.quantize is not None:
            found["quantised"] = quantize(self._at.model, self._request.quantize)._asdict()
        found |= self._scores()
        if self._dense:
            found["dense"] = self._dense
        if self._full is not None:
            found["speedup"] = relative_speed(self._full, self._at.model, self._at.shape.length)
            found["timed_on"] = self._at.place
            if "accuracy" in found:
                base, new = self._dense["accuracy"]["value"], found["accuracy"]["value"]
                found["sdr"] = sdr(100 * base, 100 * new, found["speedup"]["whole"])
                found["sdr_relative"] = sdr_relative(base, new, found["speedup"]["whole"])
        return found

    def _describe(self) -> dict[str, Any]:
        """What decides about the scores of the full model."""
        at, request, test = self._at, self._request, self._test
        described = at.described()
        return {
            **{key: described[key] for key in ("model", "parameters", "dtype")},
            "test": None if test is None else {"rows": test.rows, "length": test.length, "sha256": test.sha256},
            "tasks": list(request.tasks),
            "limit": request.limit,
            "num_fewshot": request.num_fewshot,
        }

    def _read(self, path: str) -> Scores:
        try:
            found = json.loads(Path(path).read_text(encoding="utf-8"))
            same, dense = found["measured_on"] == self._measured_on, dict(found["dense"])
        except OSError as error:
            raise UserError(
                f"full={path!r}: cannot be read: {error}. Give metrics.json of apt-trainer drop."
            ) from error
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(f"full={path!r} holds no scores of a full model. Give metrics.json of a drop.") from error
        if not same:
            raise UserError(
                f"full={path!r} was measured on another model, text or tasks. Give what it was measured with, or "
                "leave full out."
            )
        return dense

    def _scores(self) -> Scores:
        at, request, scores = self._at, self._request, Scores()
        if self._test is not None:
            name = "perplexity" if loss_name(at.model, at.units) == "perplexity" else "exp_loss"
            scores[name] = loss_with_interval(loss_sums(at.model, at.units, self._test.batches))
        if request.tasks:
            scores["tasks"] = measured(None, request.run_tasks(at.model, at.tokenizer))["tasks"]
            scores["accuracy"] = mean_of_tasks(scores["tasks"])
        return scores


def no_loss_on_text(at: Loaded) -> UserError:
    """The model has a head that running text asks nothing of."""
    return UserError(
        f"{type(at.model).__name__} has no loss on plain text. Give rows with labels (.jsonl with text and label)."
    )


def loss_with_interval(sums: Sequence[tuple[float, int]]) -> dict[str, float | None]:
    """exp of the mean of (Σ loss, count) per batch, with its 95 % interval over batches where there are several.

    A number that is not finite is None.
    """
    value = bounded_exp(sum(total for total, _ in sums) / sum(count for _, count in sums))
    if not math.isfinite(value):
        return {"value": None}
    counted = [(total / count, count) for total, count in sums if count]
    if len(counted) < 2:
        return {"value": value}
    low, high = mean_interval(*zip(*counted, strict=True))
    return {"value": value, "low": bounded_exp(low), "high": bounded_exp(high)}


def mean_of_tasks(tasks: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Mean of the tasks' values; its interval takes their errors as independent, and theirs as symmetric."""
    mean = fmean(task["value"] for task in tasks.values())
    if not all("low" in task for task in tasks.values()):
        return {"value": mean}
    half = math.sqrt(sum(((task["high"] - task["low"]) / 2) ** 2 for task in tasks.values())) / len(tasks)
    return {"value": mean, "low": mean - half, "high": mean + half}
