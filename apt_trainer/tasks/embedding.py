"""Embedding models: pairs of texts with a score of how alike they are, or pairs and triplets without one.

A row is a text, one that is like it and, in a triplet, one that is not. Batches have an axis for the texts of a row;
the model sees them as one batch (:func:`as_texts`). The losses are those of sentence-transformers. Not for the model
(``models.pooling``), nor for a score of two texts that are read together (``classification``: regression).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import EvalPrediction, PreTrainedTokenizerBase

from apt_trainer.errors import UserError
from apt_trainer.models.pooling import mean_pooling
from apt_trainer.settings import DataSettings
from apt_trainer.tasks.base import (
    Splits,
    TaskData,
    check_column,
    encode,
    fingerprint,
    is_text,
    pad_multiple,
)
from apt_trainer.tasks.classification import is_label, numbers_of
from apt_trainer.tasks.metrics import regression_scores
from apt_trainer.tasks.summed_scores import SummedScores

SCORED, UNSCORED = ("spearman", "pearson"), ("mrr", "recall_at_1")
"""Metrics of pairs with scores and without; the first of each is the default."""
EMBEDDINGS = "embeddings"
_CHUNK = 1024  # texts that are compared with all others at a time

EmbeddingLoss = Callable[[list[torch.Tensor], torch.Tensor], torch.Tensor]
"""From embeddings [B, d] of each text of a row, and labels [B], to a scalar."""


@dataclass(frozen=True)
class TextColumns:
    """``label``: the scores, None: there are none."""

    texts: tuple[str, ...]
    label: str | None

    @property
    def names(self) -> list[str]:
        return [*self.texts, *([] if self.label is None else [self.label])]


def find_columns(parts: dict[str, Dataset], data: DataSettings) -> TextColumns:
    """Two columns of text, or three with ``negative_column``, and one of scores where there is one."""
    train, negative = parts["train"], data.negative_column
    scored = data.label_column in train.column_names or data.label_column != DataSettings().label_column
    if scored and negative is not None:
        raise UserError(
            f"negative_column={negative!r} makes triplets, which have no score, but there is a column "
            f"{data.label_column!r} (label_column). Leave one of them out."
        )
    label = data.label_column if scored else None
    found = [name for name, feature in train.features.items() if is_text(feature) and name not in (label, negative)]
    if data.text_column is None and data.text_pair_column is None and len(found) == 2:
        texts = found
    elif data.text_column is None or data.text_pair_column is None:
        raise UserError(
            f"task: embedding compares two texts, and the training data have {len(found)} columns of text "
            f"({', '.join(found) or 'none'}). Set text_column and text_pair_column."
        )
    else:
        texts = [data.text_column, data.text_pair_column]
    settings = ["text_column", "text_pair_column", "negative_column"]
    texts += [] if negative is None else [negative]
    for part, rows in parts.items():
        for column, setting in zip(texts, settings, strict=False):
            check_column(rows, column, setting, part, is_text, "text")
        if label is not None:
            check_column(rows, label, "label_column", part, is_label, "one number per row")
    return TextColumns(tuple(texts), label)


def build(
    splits: Splits, columns: TextColumns, data: DataSettings, tokenizer: PreTrainedTokenizerBase, metric: str
) -> TaskData:
    """Scores are learnt by their order (CoSENT); without, each text is to find its own among those of its batch
    (multiple negatives ranking)."""
    scored = columns.label is not None
    allowed = SCORED if scored else UNSCORED
    if data.metric is None:
        metric = allowed[0]
    elif metric not in allowed:
        raise UserError(
            f"metric={metric!r} is for pairs {'without' if scored else 'with'} scores, and these have "
            f"{'some' if scored else 'none'}. Choose one of: {', '.join(allowed)}."
        )
    labels = {
        part: numbers_of(rows, columns.label, part, "embedding")[:, 0].tolist()
        if columns.label is not None
        else [0.0] * len(rows)
        for part, rows in splits.parts.items()
    }
    encoded = {
        part: encode(
            rows,
            _tokenise,
            with_indices=True,
            tokenizer=tokenizer,
            columns=columns,
            labels=np.asarray(labels[part]),
            max_length=data.max_length,
        )
        for part, rows in splits.parts.items()
    }
    scores = similarity_scores if scored else retrieval_scores
    sums = {} if scored else {"validation": retrieval_sums, "test": retrieval_sums}
    return TaskData(
        train=encoded["train"],
        validation=encoded["validation"],
        test=encoded.get("test", encoded["validation"]),
        test_name="test" if "test" in encoded else "validation",
        collator=TextsCollator(tokenizer, pad_multiple(data)),
        model_class="AutoModel",
        model_kwargs={},
        metric_name=metric,
        metrics={"validation": scores, "test": scores},
        label_names=(),
        fingerprint=fingerprint(splits.train, columns),
        sums=sums,
        embedding_loss=loss_of(scored),
    )


def loss_of(scored: bool) -> EmbeddingLoss:
    """CoSENT for pairs with scores, multiple negatives ranking without: of sentence-transformers."""
    from sentence_transformers.sentence_transformer.losses import CoSENTLoss, MultipleNegativesRankingLoss

    made = (CoSENTLoss if scored else MultipleNegativesRankingLoss)(None)  # they compare embeddings without a model
    return made.compute_loss_from_embeddings  # type: ignore[no-any-return]


def _tokenise(
    batch: dict[str, list[Any]],
    indices: list[int],
    tokenizer: PreTrainedTokenizerBase,
    columns: TextColumns,
    labels: np.ndarray,
    max_length: int,
) -> dict[str, Any]:
    found = [tokenizer(batch[column], truncation=True, max_length=max_length) for column in columns.texts]
    names = found[0].keys()
    return {name: [list(of_row) for of_row in zip(*(of[name] for of in found), strict=True)] for name in names} | {
        "labels": labels[indices].tolist()
    }


@dataclass(frozen=True)
class TextsCollator:
    """Rows of several texts as tensors [rows, texts, tokens], and their labels [rows]."""

    tokenizer: PreTrainedTokenizerBase
    pad_to_multiple_of: int | None = None

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        names = [name for name in rows[0] if name != "labels"]
        number = len(rows[0][names[0]])
        texts = [{name: row[name][text] for name in names} for row in rows for text in range(number)]
        padded = self.tokenizer.pad(texts, pad_to_multiple_of=self.pad_to_multiple_of, return_tensors="pt")
        batch = {name: values.reshape(len(rows), number, -1) for name, values in padded.items()}
        return batch | {"labels": torch.tensor([row["labels"] for row in rows], dtype=torch.float32)}


def as_texts(batch: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Inputs [rows · texts, tokens] of the model for a batch of :class:`TextsCollator`."""
    return {name: values.flatten(0, 1) for name, values in batch.items() if name != "labels"}


def embeddings_of(hidden: torch.Tensor, batch: Mapping[str, Any]) -> torch.Tensor:
    """Embeddings [rows, texts, d] from hidden states [rows · texts, tokens, d] of a batch."""
    inputs = as_texts(batch)
    return mean_pooling(hidden, inputs).unflatten(0, batch["input_ids"].shape[:2])


# ------------------------------------------------------------------------------------------------ metrics


def similarities(prediction: EvalPrediction) -> np.ndarray:
    """[rows]: cosine of the first two texts of each row."""
    first, second = np.asarray(prediction.predictions, dtype=np.float64)[:, :2].swapaxes(0, 1)
    return (first * second).sum(-1)


def similarity_scores(prediction: EvalPrediction) -> dict[str, float]:
    """How well cosines follow the scores of pairs."""
    found = regression_scores(similarities(prediction), np.ravel(prediction.label_ids))
    return {name: found[name] for name in SCORED}


def retrieval_ranks(prediction: EvalPrediction) -> np.ndarray:
    """[rows]: place, from 1, of each row's second text among all texts but the first ones, by cosine to its first."""
    embeddings = np.asarray(prediction.predictions, dtype=np.float32)
    first, own = embeddings[:, 0], (embeddings[:, 0] * embeddings[:, 1]).sum(-1)
    others = embeddings[:, 1:].reshape(-1, embeddings.shape[-1])
    ranks = []
    for start in range(0, len(first), _CHUNK):
        part = slice(start, start + _CHUNK)
        ranks.append(1 + (first[part] @ others.T > own[part, None] + 1e-6).sum(-1))
    return np.concatenate(ranks)


def retrieval_sums(prediction: EvalPrediction) -> SummedScores:
    """What :func:`retrieval_scores` sums over rows."""
    ranks = retrieval_ranks(prediction)
    rows = np.column_stack([1 / ranks, ranks == 1, np.ones(len(ranks))])
    return SummedScores(rows, lambda sums: {"mrr": sums[:, 0] / sums[:, 2], "recall_at_1": sums[:, 1] / sums[:, 2]})


def retrieval_scores(prediction: EvalPrediction) -> dict[str, float]:
    """Mean reciprocal rank, and share of rows whose own text comes first."""
    ranks = retrieval_ranks(prediction)
    return {"mrr": float((1 / ranks).mean()), "recall_at_1": float((ranks == 1).mean())}
