"""What every task shares: the result type, columns, tokenising and padding. Not for reading files: that is
:mod:`apt_trainer.tasks.loading`; not for labels (``labels``) nor for one task's own encoding: each has its module.
"""

from __future__ import annotations

import copy
import difflib
import hashlib
import json
import logging
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, is_dataclass
from types import SimpleNamespace
from typing import Any, Generic, Protocol, TypeVar

import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Dataset, Value
from tqdm import tqdm
from transformers import EvalPrediction, PreTrainedTokenizerBase

from apt_trainer.errors import UserError
from apt_trainer.libraries.quiet import is_chief
from apt_trainer.settings import DataSettings
from apt_trainer.tasks.nested import names_with_fields
from apt_trainer.tasks.shared_rows import is_sharing, shared
from apt_trainer.tasks.summed_scores import SummedScores

logger = logging.getLogger(__name__)

PART_NAMES = {"train": "training", "validation": "validation", "test": "test"}
_ADVICE = {
    "text_column": "Set text_column (and text_pair_column for pairs).",
    "image_column": "Set image_column, or give a folder whose sub-folders are the labels and hold image files.",
}
IGNORED_LABEL = -100  # the index that torch's cross-entropy leaves out

ComputeMetrics = Callable[[EvalPrediction], dict[str, float]]
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class TaskData:
    """The data side of one run, ready for a ``transformers.Trainer``.

    ``train``, ``validation`` and ``test`` are tokenised and hold the model's inputs and labels only; ``test`` is
    ``validation`` where no test data was given, as ``test_name`` says. ``metrics`` has one ``compute_metrics`` for
    "validation" and one for "test"; each returns ``metric_name`` and its companions, as fractions, correlations or
    perplexities. ``fingerprint`` is a hash of the raw training rows used, the same on every machine.

    ``preprocess_logits`` is the Trainer's ``preprocess_logits_for_metrics``: it keeps what the metrics need of a
    batch, so that the logits of a data set are never held at once. ``generation_length`` is set where the metrics
    compare generated texts: the most tokens to generate, start token included. ``keeps_order``: the metrics need
    predictions in the order of the rows. ``packed``: a training row holds several sequences, which must not see each
    other. ``sums``: what ``metrics`` sums over rows, for their intervals; empty where a row alone has its score.
    ``label_counts``: how often each label occurs in ``train``; ``class_weights``: what each counts in the loss.
    ``score_names``: of all that ``metrics`` may give, where a name may go on with that of a label.
    ``embedding_loss``: where a row is several texts that the model embeds, from embeddings [B, d] of each of them and
    labels [B] to a scalar.
    """

    train: Dataset
    validation: Dataset
    test: Dataset
    test_name: str
    collator: Callable[[list[dict[str, Any]]], Mapping[str, Any]]
    model_class: str
    metric_name: str
    metrics: Mapping[str, ComputeMetrics]
    fingerprint: str
    model_kwargs: dict[str, Any] = field(default_factory=dict)
    label_names: tuple[str, ...] = ()
    preprocess_logits: Callable[[Any, torch.Tensor], torch.Tensor] | None = None
    greater_is_better: bool = True
    generation_length: int | None = None
    keeps_order: bool = False
    packed: bool = False
    sums: Mapping[str, Callable[[EvalPrediction], SummedScores]] = field(default_factory=dict)
    label_counts: Mapping[str, int] = field(default_factory=dict)
    class_weights: tuple[float, ...] | None = None
    score_names: tuple[str, ...] = ()
    embedding_loss: Callable[[list[torch.Tensor], torch.Tensor], torch.Tensor] | None = None


def parts_of(rows: Mapping[str, Dataset]) -> dict[str, Any]:
    """The fields of :class:`TaskData` that hold rows, from those of each part."""
    tested = "test" if "test" in rows else "validation"
    return {"train": rows["train"], "validation": rows["validation"], "test": rows[tested], "test_name": tested}


class HasNames(Protocol):
    """The columns that a task reads."""

    @property
    def names(self) -> list[str]: ...


@dataclass(frozen=True)
class Columns:
    """Names of the columns in use."""

    text: str
    text_pair: str | None
    label: str

    @property
    def names(self) -> list[str]:
        return [name for name in (self.text, self.text_pair, self.label) if name is not None]


@dataclass(frozen=True)
class Splits:
    """Raw rows per part; ``all_train`` is the training data before anything was held out or left out."""

    train: Dataset
    validation: Dataset
    test: Dataset | None
    all_train: Dataset

    @property
    def parts(self) -> dict[str, Dataset]:
        parts = {"train": self.train, "validation": self.validation}
        return parts if self.test is None else parts | {"test": self.test}


def first_output(predictions: Any) -> Any:
    """The logits, where a model returned further outputs beside them."""
    return predictions[0] if isinstance(predictions, tuple | list) else predictions


def keep_logits(predictions: Any, labels: torch.Tensor) -> torch.Tensor:
    """``preprocess_logits`` of a task whose logits are small: only further outputs are dropped."""
    logits: torch.Tensor = first_output(predictions)
    return logits


@dataclass(frozen=True)
class FirstRows(Generic[_Result]):
    """``function`` without the rows that several processes repeat at the end so that their last batch is full."""

    function: Callable[[EvalPrediction], _Result]
    number: int

    def __call__(self, prediction: EvalPrediction) -> _Result:
        return self.function(
            EvalPrediction(
                predictions=_first(prediction.predictions, self.number),
                label_ids=_first(prediction.label_ids, self.number),
            )
        )


def _first(values: Any, number: int) -> Any:
    if isinstance(values, tuple | list):
        return type(values)(_first(value, number) for value in values)
    return values[:number] if hasattr(values, "__len__") else values


# ------------------------------------------------------------------------------------------------ columns


def require_column(rows: Dataset, column: str, setting: str, part: str) -> None:
    """Raise :class:`UserError` with the nearest name where ``column`` is missing from one part."""
    check_name(rows, column, f"{setting}={column!r} is not a column of the {PART_NAMES[part]} data.", setting)


def check_name(rows: Dataset, column: str, told: str, setting: str = "text_column") -> None:
    """Raise :class:`UserError` where ``rows`` have no such column: what is ``told``, their columns, the nearest."""
    if column in rows.column_names:
        return
    names = names_with_fields(rows)
    close = difflib.get_close_matches(column, names, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else f" Set {setting}."
    record = column.partition(".")[0]
    if record != column and record in names and not any(name.startswith(f"{record}.") for name in names):
        hint = f" Not every row of {record!r} is a record with the same fields."
    raise UserError(f"{told} Its columns are: {', '.join(names)}.{hint}")


def is_text(feature: Any) -> bool:
    return isinstance(feature, Value) and feature.dtype in ("string", "large_string")


def is_list_of_text(feature: Any) -> bool:
    return is_text(getattr(feature, "feature", None))


def only_column(
    rows: Dataset,
    taken: Iterable[str | None],
    fits: Callable[[Any], bool],
    kind: str,
    setting: str = "text_column",
) -> str:
    """The one column of the wanted kind that is not taken; :class:`UserError` where there is none or several."""
    found = [name for name, feature in rows.features.items() if fits(feature) and name not in taken]
    if len(found) == 1:
        return found[0]
    several = f"several columns hold {kind} ({', '.join(found)})" if found else f"no further column holds {kind}"
    raise UserError(
        f"{setting} is not set, and in the training data {several}. "
        f"Its columns are: {', '.join(names_with_fields(rows))}. {_ADVICE[setting]}"
    )


def check_column(rows: Dataset, column: str, setting: str, part: str, fits: Callable[[Any], bool], kind: str) -> None:
    """Raise :class:`UserError` unless the column is there, holds the wanted kind and has no empty cell."""
    require_column(rows, column, setting, part)
    if not fits(rows.features[column]):
        raise UserError(
            f"{setting}={column!r} of the {PART_NAMES[part]} data must hold {kind}, but holds {rows.features[column]}."
        )
    check_filled(rows, column, setting, part)


def check_filled(rows: Dataset, column: str, setting: str, part: str) -> None:
    """Raise :class:`UserError` naming the first row whose cell is empty."""
    cells: pa.ChunkedArray = rows.select_columns([column]).with_format("arrow")[:].column(0)
    if cells.null_count:
        row = pc.index(pc.is_null(cells), True).as_py()
        raise UserError(
            f"{setting}={column!r} of the {PART_NAMES[part]} data is empty in {cells.null_count} of {len(rows)} rows, "
            f"first in row {row} (counted from 0). Fill these rows or remove them."
        )


# ------------------------------------------------------------------------------------------------ encoding


def encode(
    rows: Dataset, function: Callable[..., dict[str, Any]], *, with_indices: bool = False, **kwargs: Any
) -> Any:
    """Map batches of raw rows to model inputs; every raw column is dropped.

    Kept in memory and never read from the cache on disk: that cache knows a library function by its name alone, so it
    would bring back rows encoded by an older version. A run and the one that it starts on the same data share them.
    """

    def make() -> Dataset:
        off = None if is_chief() else True  # None: unless it is a terminal
        with tqdm(total=len(rows), desc="tokenizing", unit=" rows", leave=False, delay=2, disable=off) as bar:

            def told(batch: Any, *others: Any, **options: Any) -> dict[str, Any]:
                encoded = function(batch, *others, **options)
                bar.update(len(batch[rows.column_names[0]]))
                return encoded

            return rows.map(
                told,
                batched=True,
                with_indices=with_indices,
                remove_columns=rows.column_names,
                keep_in_memory=True,
                load_from_cache_file=False,
                new_fingerprint=uuid.uuid4().hex[:16],  # else all that the function refers to is hashed
                fn_kwargs=kwargs,
            )

    if not is_sharing():
        return make()
    plain = {k: repr(v) for k, v in kwargs.items() if v is None or isinstance(v, str | int) or is_dataclass(v)}
    of_rows = fingerprint(rows, SimpleNamespace(names=rows.column_names))
    told_apart = json.dumps([function.__module__, function.__qualname__, plain], sort_keys=True)
    return shared(f"{of_rows}-{hashlib.sha256(told_apart.encode()).hexdigest()[:16]}", make)


def pad_multiple(data: DataSettings) -> int | None:
    """8 on a GPU, where it is faster, unless that could exceed max_length; nothing on CPU."""
    return 8 if torch.cuda.is_available() and data.max_length % 8 == 0 else None


def require_fast(tokenizer: PreTrainedTokenizerBase, task: str) -> None:
    if not tokenizer.is_fast:
        raise UserError(
            f"task={task!r} needs to know where each token comes from, which {type(tokenizer).__name__} cannot tell. "
            "Use a model with a fast tokenizer (tokenizer.json)."
        )


def right_padding(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """A copy that pads on the right, whatever side the original is set to for generation."""
    padded = copy.copy(tokenizer)
    padded.padding_side = "right"
    return padded


def end_with_eos(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """``ids`` with the end-of-text token behind them, once; unchanged where the tokenizer has none."""
    eos = tokenizer.eos_token_id
    return ids if eos is None or ids[-1:] == [eos] else [*ids, eos]


def without_blank(rows: Dataset, column: str, setting: str, part: str) -> Dataset:
    """The rows whose text is more than white space; says how many are not, and raises :class:`UserError` if all."""
    kept = [row for row, text in enumerate(rows[column]) if text.strip()]
    if not kept:
        raise UserError(f"{setting}={column!r} of the {PART_NAMES[part]} data holds no text in any row. Give text.")
    if len(kept) == len(rows):
        return rows
    logger.warning(
        "%d of %d rows of the %s data have no text in %r and are dropped.",
        len(rows) - len(kept),
        len(rows),
        PART_NAMES[part],
        column,
    )
    return rows.select(kept)


def fingerprint(rows: Dataset, columns: HasNames) -> str:
    """Hash of the raw cells in use, 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for batch in rows.select_columns(columns.names).iter(batch_size=1000):
        digest.update(json.dumps(batch, sort_keys=True, default=str).encode())
    return digest.hexdigest()[:16]
