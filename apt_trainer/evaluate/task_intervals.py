"""95 % confidence intervals of a task's scores, from its predictions (percentile bootstrap over rows).

For every score of every task. Scores of tags, answers and translations come from what a row adds to their sums, which
the task tells. Not for how much two models differ on the same rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from scipy import stats
from transformers import EvalPrediction

from apt_trainer.evaluate.bootstrap import CELLS, RESAMPLES, Interval, interval_of, mean_interval, summed_intervals
from apt_trainer.tasks.base import ComputeMetrics, first_output
from apt_trainer.tasks.embedding import SCORED, similarities
from apt_trainer.tasks.generation_scores import ROUGE
from apt_trainer.tasks.metrics import as_columns, number_names
from apt_trainer.tasks.summed_scores import SummedScores

Intervals = dict[str, Interval]


def score_intervals(
    task: str,
    metric: str,
    prediction: EvalPrediction,
    metrics: ComputeMetrics,
    sums: Callable[[EvalPrediction], SummedScores] | None = None,
    names: Sequence[str] = (),
) -> Intervals:
    """Interval of each score that ``metrics`` gives for ``prediction``, as far as one is known.

    Args:
        task: Its name in ``TASK_KINDS``.
        metric: Name of its metric; with "perplexity" the predictions of any task are sums per row.
        prediction: Of all rows, in the form that the task gives to ``metrics``.
        metrics: ``compute_metrics`` of the task.
        sums: What it sums over rows, where the task tells.
        names: Of the numbers of a regression, if they have any.
    """
    if sums is not None:
        summed = sums(prediction)
        return summed_intervals(summed.rows, summed.scores)
    outputs = first_output(prediction.predictions)
    if metric in ("perplexity", "token_accuracy"):
        return token_intervals(np.asarray(outputs, dtype=np.float64))
    if task in ("classification", "image_classification"):
        return classification_intervals(np.asarray(outputs), np.asarray(prediction.label_ids))
    if task == "embedding":
        found = regression_intervals(similarities(prediction), np.ravel(prediction.label_ids))
        return {name: found[name] for name in SCORED}
    if task == "regression":
        return regression_intervals(np.asarray(outputs), np.asarray(prediction.label_ids), names)
    if task == "summarization":
        rows = range(len(outputs))
        scores = [metrics(EvalPrediction(outputs[i : i + 1], prediction.label_ids[i : i + 1])) for i in rows]
        return {name: mean_interval([score[name] for score in scores]) for name in ROUGE}
    return {}


def token_intervals(sums: np.ndarray) -> Intervals:
    """Of the result [rows, 3] of :func:`~apt_trainer.tasks.token_scores.aligned_sums`, for rows with a token."""
    losses, tokens, right = sums[sums[:, 1] > 0].T
    if len(tokens) == 0:
        return {}
    low, high = np.exp(mean_interval(losses / tokens, tokens))
    return {
        "perplexity": Interval(float(low), float(high)),
        "token_accuracy": mean_interval(right / tokens, tokens),
    }


def classification_intervals(logits: np.ndarray, labels: np.ndarray) -> Intervals:
    """Of :func:`~apt_trainer.tasks.metrics.classification_scores`.

    A draw of rows is a draw from the cells of the confusion matrix, so one multinomial number per cell suffices.
    """
    predicted, classes = logits.argmax(-1), logits.shape[-1]
    cells, counts = np.unique(labels * classes + predicted, return_counts=True)
    generator = np.random.default_rng(0)
    size = max(1, CELLS // classes**2)
    f1, macro, matthews = [], [], []
    for start in range(0, RESAMPLES, size):
        drawn = generator.multinomial(len(labels), counts / len(labels), size=min(size, RESAMPLES - start))
        confusion = np.zeros((len(drawn), classes**2))
        confusion[:, cells] = drawn
        confusion = confusion.reshape(-1, classes, classes)  # true × predicted
        of_labels, seen = _f1(confusion)
        macro.append(of_labels.sum(axis=1) / seen)
        f1.append(of_labels[:, 1] if classes == 2 else macro[-1])
        matthews.append(_matthews(confusion))
    return {
        "accuracy": mean_interval(predicted == labels),
        "f1": interval_of(np.concatenate(f1)),
        "f1_macro": interval_of(np.concatenate(macro)),
        "matthews": interval_of(np.concatenate(matthews)),
    }


def _f1(confusion: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """([draws, labels] F1 of each label, [draws] how many labels are true or predicted somewhere)."""
    right = np.diagonal(confusion, axis1=1, axis2=2)
    total = confusion.sum(axis=1) + confusion.sum(axis=2)
    return 2 * right / np.maximum(total, 1), (total > 0).sum(axis=1)


def _matthews(confusion: np.ndarray) -> np.ndarray:
    """[draws]; 0 where all rows have one label or are given one (Gorodkin, 2004)."""
    predicted, true, rows = confusion.sum(axis=1), confusion.sum(axis=2), confusion.sum(axis=(1, 2))
    right = np.trace(confusion, axis1=1, axis2=2)
    covariance = right * rows - (predicted * true).sum(axis=1)
    product = (rows**2 - (predicted**2).sum(axis=1)) * (rows**2 - (true**2).sum(axis=1))
    return np.divide(covariance, np.sqrt(product), out=np.zeros_like(covariance), where=product > 0)


def regression_intervals(predicted: np.ndarray, labels: np.ndarray, names: Sequence[str] = ()) -> Intervals:
    """Of :func:`~apt_trainer.tasks.metrics.regression_scores`."""
    predicted, labels = as_columns(predicted), as_columns(labels)
    draws = {
        "pearson": _resampled(_pearson, predicted, labels),
        "spearman": _resampled(_spearman, predicted, labels),
        "mse": _resampled(lambda a, b: ((a - b) ** 2).mean(axis=1), predicted, labels),
    }
    found = {score: interval_of(values.mean(axis=1)) for score, values in draws.items()}
    width = predicted.shape[1]
    for i, name in enumerate(number_names(names, width) if width > 1 else ()):
        found |= {f"{score}_{name}": interval_of(values[:, i]) for score, values in draws.items()}
    return found


def _resampled(statistic: Callable[[np.ndarray, np.ndarray], np.ndarray], *values: np.ndarray) -> np.ndarray:
    """[draws, numbers] of a ``statistic`` of [draws, n, numbers] each, for ``values`` [n, numbers]."""
    (n, width), generator = values[0].shape, np.random.default_rng(0)
    size = max(1, CELLS // (n * width))
    found = []
    for start in range(0, RESAMPLES, size):
        rows = generator.integers(n, size=(min(size, RESAMPLES - start), n))
        found.append(statistic(*(of[rows] for of in values)))
    return np.concatenate(found)


def _pearson(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """[draws, numbers] of [draws, n, numbers]; 0 where one side is constant."""
    varies = (np.ptp(a, axis=1) > 0) & (np.ptp(b, axis=1) > 0)
    a, b = a - a.mean(axis=1, keepdims=True), b - b.mean(axis=1, keepdims=True)
    scale = np.sqrt((a**2).sum(axis=1) * (b**2).sum(axis=1))
    return np.divide((a * b).sum(axis=1), scale, out=np.zeros(scale.shape), where=varies & (scale > 0))


def _spearman(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return _pearson(stats.rankdata(a, axis=1), stats.rankdata(b, axis=1))
