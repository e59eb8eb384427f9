"""Scores as functions of sums over rows, so that the score of any draw of rows can be told: for confidence intervals.

Of several labels per row, tags, answers and translations. Not for the scores of a whole data set: those are in
``metrics`` and ``generation_scores``, and the sum over all rows gives the same numbers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from apt_trainer.tasks.metrics import bio_spans, looks_like_bio, predicted_labels, squad_rows

_CHARACTERS, _BETA = 6, 2  # sacrebleu's defaults of chrF
_WORDS = 4  # longest n-gram of BLEU


class SummedScores(NamedTuple):
    """``rows`` [rows, numbers]: what each row adds; ``scores``: from sums [draws, numbers], name to [draws]."""

    rows: np.ndarray
    scores: Callable[[np.ndarray], Mapping[str, np.ndarray]]


def answer_sums(predicted: Sequence[str], golds: Sequence[Sequence[str]]) -> SummedScores:
    """Of :func:`~apt_trainer.tasks.metrics.squad_scores`: a row is a question, with or without an answer."""
    rows = squad_rows(predicted, golds)
    return SummedScores(
        np.column_stack([rows, np.ones(len(rows))]),
        lambda sums: {"exact_match": sums[:, 0] / sums[:, 2], "f1": sums[:, 1] / sums[:, 2]},
    )


def multi_label_sums(logits: np.ndarray, labels: np.ndarray) -> SummedScores:
    """Of :func:`~apt_trainer.tasks.metrics.multi_label_scores`: per label right, predicted and expected."""
    predicted, expected = predicted_labels(logits), np.asarray(labels) > 0.5
    right = (predicted == expected).all(axis=1)
    counts = np.stack([predicted & expected, predicted, expected], axis=2).reshape(len(right), -1)

    def scores(sums: np.ndarray) -> dict[str, np.ndarray]:
        of_labels = sums[:, 2:].reshape(len(sums), -1, 3)
        return {
            "f1_micro": _f1(of_labels.sum(axis=1)),
            "f1_macro": _f1(of_labels).mean(axis=1),
            "subset_accuracy": sums[:, 0] / sums[:, 1],
        }

    return SummedScores(np.column_stack([right, np.ones(len(right)), counts]).astype(float), scores)


def tag_sums(
    predicted: Sequence[Sequence[str]], expected: Sequence[Sequence[str]], names: Sequence[str]
) -> SummedScores:
    """Of :func:`~apt_trainer.tasks.metrics.tag_scores`, and of ``entity_scores`` where ``names`` are B-, I- and O.

    A row is a sentence. Per tag its tokens right, predicted and expected; entities the same.
    """
    pairs = list(zip(predicted, expected, strict=True))
    kept = [name for name in names if name != "O"]
    tokens = np.array([[sum(p == e for p, e in zip(*pair, strict=True)), len(pair[1])] for pair in pairs])
    tags = np.array([_tag_counts(*pair, kept) for pair in pairs], dtype=int).reshape(len(pairs), -1)
    parts, bio = [tokens, tags], looks_like_bio(names)
    if bio:
        parts.append(np.array([_entity_counts(*pair) for pair in pairs]))

    def scores(sums: np.ndarray) -> dict[str, np.ndarray]:
        of_tags = sums[:, 2 : 2 + 3 * len(kept)].reshape(len(sums), len(kept), 3)
        macro = _f1(of_tags).sum(axis=1) / np.maximum((of_tags.sum(axis=2) > 0).sum(axis=1), 1)
        found = {"accuracy": _ratio(sums[:, 0], sums[:, 1]), "f1": macro}
        found |= {"f1_macro": macro, "f1_micro": _f1(of_tags.sum(axis=1))}
        if bio:
            right, given, wanted = sums[:, -3:].T
            found |= {"f1": _f1(sums[:, -3:]), "precision": _ratio(right, given), "recall": _ratio(right, wanted)}
        return found

    return SummedScores(np.concatenate(parts, axis=1), scores)


def _tag_counts(predicted: Sequence[str], expected: Sequence[str], names: Sequence[str]) -> list[tuple[int, ...]]:
    right = Counter(p for p, e in zip(predicted, expected, strict=True) if p == e)
    counts = right, Counter(predicted), Counter(expected)
    return [tuple(count[name] for count in counts) for name in names]


def _entity_counts(predicted: Sequence[str], expected: Sequence[str]) -> tuple[int, int, int]:
    found, wanted = set(bio_spans(predicted)), set(bio_spans(expected))
    return len(found & wanted), len(found), len(wanted)


def translation_sums(predicted: Sequence[str], expected: Sequence[str]) -> SummedScores:
    """Of :func:`~apt_trainer.tasks.generation_scores.translation_scores`: a row is a text.

    BLEU: n-grams right and given, and lengths, as sacrebleu counts them. chrF: character n-grams right, given and
    wanted (Popović, 2015; orders that a side has none of are left out, as sacrebleu does).
    """
    from sacrebleu.metrics import BLEU

    bleu = BLEU(effective_order=True)  # what is counted does not depend on it
    rows = []
    for text, reference in zip(predicted, expected, strict=True):
        found = bleu.sentence_score(text, [reference])
        words = [*found.counts, *found.totals, found.sys_len, found.ref_len]
        rows.append([*words, *_character_counts(text, reference)])
    return SummedScores(
        np.array(rows),
        lambda sums: {
            "bleu": _bleu(sums[:, : 2 * _WORDS + 2]),
            "chrf": _chrf(sums[:, 2 * _WORDS + 2 :].reshape(len(sums), _CHARACTERS, 3)),
        },
    )


def _bleu(sums: np.ndarray) -> np.ndarray:
    """[draws] from [draws, 10]."""
    from sacrebleu.metrics import BLEU

    scores = []
    for counts in sums.astype(int).tolist():
        right, given, (length, wanted) = counts[:_WORDS], counts[_WORDS : 2 * _WORDS], counts[2 * _WORDS :]
        scores.append(BLEU.compute_bleu(right, given, length, wanted, smooth_method="exp").score / 100)
    return np.array(scores)


def _character_counts(text: str, reference: str) -> list[int]:
    from sacrebleu.metrics.helpers import extract_all_char_ngrams

    sides = zip(*(extract_all_char_ngrams(side, _CHARACTERS) for side in (text, reference)), strict=True)
    counts = []
    for given, wanted in sides:
        counts += [(given & wanted).total(), given.total() if wanted else 0, wanted.total()]
    return counts


def _chrf(sums: np.ndarray) -> np.ndarray:
    """[draws] from [draws, orders, 3]."""
    right, given, wanted = np.moveaxis(sums, 2, 0)
    orders = np.maximum(((given > 0) & (wanted > 0)).sum(axis=1), 1)
    precision, recall = _ratio(right, given).sum(axis=1) / orders, _ratio(right, wanted).sum(axis=1) / orders
    return _ratio((1 + _BETA**2) * precision * recall, _BETA**2 * precision + recall)


def _f1(counts: np.ndarray) -> np.ndarray:
    """[…] from right, given and wanted […, 3]; 0 where nothing is given or wanted."""
    return _ratio(2 * counts[..., 0], counts[..., 1] + counts[..., 2])


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """0 where there is no whole."""
    return np.divide(part, whole, out=np.zeros(np.shape(part)), where=whole > 0)
