"""A model and its tokenizer without the tokens that no text of the user's has, written as a folder to start from.

A run with ``vocabulary`` starts from such a folder, inside of its own, so that everything after it (teacher, resume,
saving, exports) has an ordinary model with a smaller vocabulary. Not for choosing tokens (``tasks.vocabulary``) nor
for cutting weights (``surgery.vocabulary``).
"""

from __future__ import annotations

import copy
import json
import logging
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from datasets import Dataset

from apt_trainer.errors import UserError
from apt_trainer.measure import count_parameters
from apt_trainer.settings import ModelSettings
from apt_trainer.settings.recipe import Recipe
from apt_trainer.store.events import write_json
from apt_trainer.store.pretrained import load_config, load_inputs, load_saved, load_tokenizer, refuse_images
from apt_trainer.surgery.vocabulary import cut_vocabulary, renumber_config
from apt_trainer.tasks.base import is_text
from apt_trainer.tasks.loading import read_file
from apt_trainer.tasks.vocabulary import check_tokenizer, choose_tokens, count_tokens, cut_tokenizer
from apt_trainer.training.engines.agreement import failing_together

logger = logging.getLogger(__name__)

FOLDER, RECORD = "vocabulary", "vocabulary.json"
USED = "used"
_LINES = 1000


@contextmanager
def vocabulary_cut(recipe: Recipe, folder: Path, weights: bool = True) -> Iterator[tuple[Recipe, dict[str, Any]]]:
    """Within it, ``recipe`` with a model, and a teacher, of the vocabulary that it asks for, made in ``folder`` by the
    first process; and a record of it, which is empty where it asks for none. Collective.

    An earlier one in ``folder`` that was made of the same is taken as it is. ``weights``: else there are a tokenizer
    and a config alone. The folder is removed where the context ends without an error.

    Raises:
        UserError: the tokenizer cannot be cut, the number is too small, or the teacher has another tokenizer.
    """
    if recipe.model.vocabulary is None:
        yield recipe, {}
        return
    teacher, args = recipe.training.teacher_name_or_path, recipe.training
    with failing_together():
        if args.process_index == 0:
            _make(recipe, folder, weights)
    record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    args = copy.copy(args)
    args.teacher_name_or_path = None if teacher is None else str(folder / "teacher")
    yield replace(recipe, model=recipe.model.of(str(folder / "model")), training=args), record
    with failing_together():
        if args.process_index == 0:
            shutil.rmtree(folder)


def cut_model(
    model: ModelSettings, files: Sequence[str], output: Path, size: int | None = None, other: Sequence[str] = ()
) -> dict[str, Any]:
    """Write ``model`` to the new folder ``output`` with the tokens that the texts of ``files`` have, at most ``size``.

    Args:
        files: text files, or tables all of whose columns of text count.
        other: further ones, which tokens are not chosen by: what they cost is recorded.

    Returns:
        What was written: numbers of tokens, of parameters and of bytes before and after, tokens per word.

    Raises:
        UserError: an unreadable file, or what :func:`vocabulary_cut` raises.
    """
    if output.exists() and any(output.iterdir()):
        raise UserError(f"{output} is not empty. Choose another folder.")
    refuse_images(load_config(model), "vocabulary")
    tokenizer = load_tokenizer(model)
    check_tokenizer(tokenizer)
    texts = [text for file in files for text in _texts(file, "--data")]
    kept = choose_tokens(tokenizer, count_tokens(_encoded(tokenizer, texts)), size)
    small = cut_tokenizer(tokenizer, kept)
    record = _write(model, tokenizer, small, kept, output, weights=True)
    for name, found in (("data", texts), ("other", [text for file in other for text in _texts(file, "--other")])):
        words = sum(len(text.split()) for text in found)
        if words:
            numbers = [sum(map(len, _encoded(t, found))) / words for t in (tokenizer, small)]
            record[f"tokens_per_word_{name}_before"], record[f"tokens_per_word_{name}"] = numbers
    write_json(output / RECORD, record)
    return record


def _make(recipe: Recipe, folder: Path, weights: bool) -> None:
    """Write ``folder``: the model, the teacher if there is one, and the record, the last of all."""
    asked = recipe.model.vocabulary
    refuse_images(load_config(recipe.model), "vocabulary")
    tokenizer = load_tokenizer(recipe.model)
    check_tokenizer(tokenizer)
    _, config, data = load_inputs(recipe.model, recipe)
    teacher = recipe.training.teacher_name_or_path
    settings = {**asdict(recipe.model), **asdict(recipe.data), "seed": recipe.training.seed}
    made_of = json.loads(json.dumps([settings, teacher, data.fingerprint, weights], default=str))
    if (folder / RECORD).is_file() and json.loads((folder / RECORD).read_text(encoding="utf-8"))["of"] == made_of:
        return
    shutil.rmtree(folder, ignore_errors=True)
    counts = count_tokens(_rows(data.train, "input_ids"))
    if config.is_encoder_decoder:  # whose labels are a text of their own
        counts = _added(counts, count_tokens(_rows(data.train, "labels")))
    if isinstance(asked, str) and asked != USED:
        counts = _added(counts, count_tokens(_encoded(tokenizer, _texts(asked, "vocabulary"))))
    kept = choose_tokens(tokenizer, counts, asked if isinstance(asked, int) else None)
    small = cut_tokenizer(tokenizer, kept)
    record = _write(recipe.model, tokenizer, small, kept, folder / "model", weights)
    if teacher is not None:
        of_teacher = recipe.model.of(teacher)
        if load_tokenizer(of_teacher).get_vocab() != tokenizer.get_vocab():
            raise UserError(
                f"teacher_name_or_path={teacher!r} has another tokenizer than the model, so its vocabulary cannot be "
                "cut alike. Give a teacher with the same tokenizer, or leave vocabulary out."
            )
        _write(of_teacher, tokenizer, small, kept, folder / "teacher", weights)
    _, _, again = load_inputs(recipe.model.of(str(folder / "model")), recipe)
    record |= {
        "of": made_of,
        "validation_tokens_before": sum(map(len, _rows(data.validation, "input_ids"))),
        "validation_tokens": sum(map(len, _rows(again.validation, "input_ids"))),
        "training_rows_changed": _changed(data.train, again.train, kept),
    }
    write_json(folder / RECORD, record)
    more = record["validation_tokens"] / record["validation_tokens_before"] - 1
    logger.warning(
        "vocabulary: %s of %s tokens stay; the validation rows take %.1f %% more tokens.",
        f"{len(kept):,}",
        f"{record['tokens_before']:,}",
        100 * more,
    )


def _write(
    settings: ModelSettings, tokenizer: Any, small: Any, kept: Sequence[int], folder: Path, weights: bool
) -> dict[str, Any]:
    """Write tokenizer and model, or its config alone, and say what they had and have."""
    record = {"tokens_before": len(tokenizer), "tokens": len(kept)}
    small.save_pretrained(folder)
    if not weights:
        config = load_config(settings)
        renumber_config(config, {old: new for new, old in enumerate(kept)}, len(kept))
        config.save_pretrained(folder)
        return record
    load_config(settings)  # refuses quantised weights
    model = load_saved(settings)
    record |= {"parameters_before": count_parameters(model), "bytes_before": _bytes(model)}
    cut_vocabulary(model, kept)
    model.save_pretrained(folder)
    return record | {"parameters": count_parameters(model), "bytes": _bytes(model)}


def _bytes(model: Any) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


def _rows(rows: Dataset, column: str) -> Iterator[list[int]]:
    """Token ids of each row; where a row is several texts, of all of them."""
    for row in rows[column]:
        yield [number for text in row for number in text] if row and isinstance(row[0], list) else row


def _changed(before: Dataset, after: Dataset, kept: Sequence[int]) -> int:
    """How many rows are split otherwise."""
    # packed rows can be more than they were
    pairs = zip(_rows(before, "input_ids"), _rows(after, "input_ids"), strict=False)
    return sum([kept[number] for number in new] != old for old, new in pairs)


def _added(counts: dict[int, int], more: dict[int, int]) -> dict[int, int]:
    return {number: counts.get(number, 0) + more.get(number, 0) for number in counts | more}


def _texts(path: str, setting: str) -> list[str]:
    """All texts of a file."""
    rows = read_file(path, setting, "language_modeling")
    columns = [name for name, feature in rows.features.items() if is_text(feature)]
    if not columns:
        raise UserError(f"{setting}={path!r} has no column of text. Its columns are: {', '.join(rows.column_names)}.")
    return [text for name in columns for text in rows[name] if text]


def _encoded(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    found: list[list[int]] = []
    for start in range(0, len(texts), _LINES):
        found += tokenizer(list(texts[start : start + _LINES]), truncation=False, padding=False)["input_ids"]
    return found
