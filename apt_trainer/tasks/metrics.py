"""Scores of every task from predictions and labels, as fractions in [0, 1] or correlations. Not for losses.

Exact match and F1 of question answering follow the definitions of SQuAD 2.0 (Rajpurkar et al., 2018, arXiv
1806.03822); spans of tags follow those of the CoNLL-2000 shared task.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

import numpy as np
from scipy import stats
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef, mean_squared_error

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def classification_scores(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """``logits`` [N, labels], ``labels`` [N]; f1 is that of label 1 if there are two labels, else the macro mean;
    ``f1_macro`` is always that mean."""
    predicted = np.argmax(logits, axis=-1)
    average = "binary" if logits.shape[-1] == 2 else "macro"
    return {
        "accuracy": float(accuracy_score(labels, predicted)),
        "f1": float(f1_score(labels, predicted, average=average, zero_division=0)),
        "f1_macro": float(f1_score(labels, predicted, average="macro", zero_division=0)),
        "matthews": float(matthews_corrcoef(labels, predicted)),
    }


def multi_label_scores(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Both [N, labels], ``labels`` 0 or 1; a label is predicted from a probability of 0.5 on.

    F1 over all decisions (micro) and its mean over labels (macro, 0 for a label that neither occurs nor is predicted),
    and the share of rows with all labels right.
    """
    predicted, expected = predicted_labels(logits), np.asarray(labels) > 0.5
    return {
        "f1_micro": float(f1_score(expected, predicted, average="micro", zero_division=0)),
        "f1_macro": float(f1_score(expected, predicted, average="macro", zero_division=0)),
        "subset_accuracy": float((predicted == expected).all(axis=1).mean()),
    }


def predicted_labels(logits: np.ndarray) -> np.ndarray:
    """[N, labels] of bool: where the sigmoid of ``logits`` is at least 0.5."""
    return np.asarray(logits) >= 0


def regression_scores(predicted: np.ndarray, labels: np.ndarray, names: Sequence[str] = ()) -> dict[str, float]:
    """Both [N], or [N, numbers]: then the mean over numbers and, as ``pearson_NAME``, the score of each.

    ``names``: of the numbers, by default 0, 1, … A correlation with constant numbers is undefined and reported as 0.
    """
    predicted, labels = as_columns(predicted), as_columns(labels)
    of_each = [_of_number(*columns) for columns in zip(predicted.T, labels.T, strict=True)]
    scores = {score: float(np.mean([one[score] for one in of_each])) for score in of_each[0]}
    if len(of_each) > 1:
        for name, one in zip(number_names(names, len(of_each)), of_each, strict=True):
            scores |= {f"{score}_{name}": value for score, value in one.items()}
    return scores


def as_columns(numbers: np.ndarray) -> np.ndarray:
    """[N] or [N, numbers] as [N, numbers] float64."""
    return np.asarray(numbers, dtype=np.float64).reshape(len(numbers), -1)


def number_names(names: Sequence[str], width: int) -> tuple[str, ...]:
    """``names`` of the ``width`` numbers of a regression, or 0, 1, … where they have none."""
    return tuple(names) if len(names) == width else tuple(map(str, range(width)))


def _of_number(predicted: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Both [N]."""
    varies = len(labels) > 1 and np.ptp(predicted) > 0 and np.ptp(labels) > 0
    return {
        "pearson": float(stats.pearsonr(predicted, labels).statistic) if varies else 0.0,
        "spearman": float(stats.spearmanr(predicted, labels).statistic) if varies else 0.0,
        "mse": float(mean_squared_error(labels, predicted)),
    }


def tag_scores(predicted: Sequence[Sequence[str]], expected: Sequence[Sequence[str]]) -> dict[str, float]:
    """Scores of tags per token; the tag "O" is left out of both F1, and ``f1`` is the macro mean."""
    flat_predicted = [tag for tags in predicted for tag in tags]
    flat_expected = [tag for tags in expected for tag in tags]
    kept = sorted({*flat_predicted, *flat_expected} - {"O"})

    def f1(average: str) -> float:
        if not kept:
            return 0.0
        return float(f1_score(flat_expected, flat_predicted, labels=kept, average=average, zero_division=0))

    scores = {"f1_macro": f1("macro"), "f1_micro": f1("micro")}
    return {"accuracy": float(accuracy_score(flat_expected, flat_predicted)), "f1": scores["f1_macro"], **scores}


def entity_scores(predicted: Sequence[Sequence[str]], expected: Sequence[Sequence[str]]) -> dict[str, float]:
    """Micro precision, recall and F1 of entities: type, first and last token must all be right."""
    found = {(row, *span) for row, tags in enumerate(predicted) for span in bio_spans(tags)}
    wanted = {(row, *span) for row, tags in enumerate(expected) for span in bio_spans(tags)}
    right = len(found & wanted)
    return {
        "f1": 2 * right / max(len(found) + len(wanted), 1),
        "precision": right / max(len(found), 1),
        "recall": right / max(len(wanted), 1),
    }


def bio_spans(tags: Sequence[str]) -> list[tuple[str, int, int]]:
    """Entities as (type, first token, token after the last); an I- that continues nothing starts an entity."""
    spans: list[tuple[str, int, int]] = []
    kind, first = "", 0
    for i, tag in enumerate([*tags, "O"]):
        prefix, _, current = tag.partition("-")
        if prefix != "I" or current != kind:
            if kind:
                spans.append((kind, first, i))
            kind, first = current, i
    return spans


def looks_like_bio(names: Sequence[str]) -> bool:
    """Whether all tags are O, B-TYPE or I-TYPE."""
    inside = [name for name in names if name != "O"]
    return bool(inside) and all(re.fullmatch(r"[BI]-.+", name) for name in inside)


def normalise_answer(text: str) -> str:
    """Lower case, without punctuation, English articles and extra white space."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def answer_f1(predicted: str, gold: str) -> float:
    """F1 of the shared words; where either answer is empty, 1 if both are."""
    words, gold_words = normalise_answer(predicted).split(), normalise_answer(gold).split()
    if not words or not gold_words:
        return float(words == gold_words)
    shared = sum((Counter(words) & Counter(gold_words)).values())
    return 2 * shared / (len(words) + len(gold_words))


def squad_scores(predicted: Sequence[str], golds: Sequence[Sequence[str]]) -> dict[str, float]:
    """Means over questions of :func:`squad_rows`."""
    exact, f1 = squad_rows(predicted, golds).mean(axis=0)
    return {"exact_match": float(exact), "f1": float(f1)}


def squad_rows(predicted: Sequence[str], golds: Sequence[Sequence[str]]) -> np.ndarray:
    """[questions, 2]: exact match and F1, the best against any gold answer; none at all means that "" is right."""
    rows = []
    for text, answers in zip(predicted, golds, strict=True):
        allowed = [answer for answer in answers if normalise_answer(answer)] or [""]
        exact = max(normalise_answer(text) == normalise_answer(answer) for answer in allowed)
        rows.append((float(exact), max(answer_f1(text, answer) for answer in allowed)))
    return np.array(rows)
