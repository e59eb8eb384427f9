"""What rows of a file nobody has described are for: the task, which column is what, and which rows are odd.

Names of columns are asked first, then what is in the cells. What was decided and could be wrong is said. Not for
checking settings (``load_task``) nor for values of a run (``runs.first_recipe``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from datasets import ClassLabel, Dataset, Value

from apt_trainer.errors import UserError
from apt_trainer.models.labels import as_text
from apt_trainer.tasks.architecture import DECODER, ENCODER, ENCODER_DECODER, IMAGE
from apt_trainer.tasks.base import is_list_of_text, is_text, require_column
from apt_trainer.tasks.images import is_image
from apt_trainer.tasks.labels import is_blank
from apt_trainer.tasks.nested import names_with_fields, with_fields
from apt_trainer.tasks.odd_rows import odd_rows
from apt_trainer.tasks.prompts import MESSAGES, Template, is_conversation

_SAMPLE = 20_000
_CLASSES = 20  # most different whole numbers that are still taken for classes
_LABEL_CHARACTERS = 40
_SEPARATORS = ("|", ";", ",")

_LABEL_NAMES: tuple[str, ...] = (
    *("label", "labels", "class", "category", "categories", "target", "sentiment", "intent", "topic", "tag", "tags"),
    *("genre", "verdict", "emotion", "stars", "rating", "score", "similarity", "y"),
)
_TEXT_NAMES: tuple[str, ...] = (
    *("text", "sentence", "content", "review", "comment", "message", "body", "utterance", "document", "tweet"),
    *("description", "question", "query", "headline", "title"),
)
_ID_NAMES = ("id", "idx", "index", "uid", "guid", "row", "unnamed: 0", "")
_PAIR_NAMES = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("text1", "text2"),
    ("text_a", "text_b"),
    ("sentence_a", "sentence_b"),
    ("anchor", "positive"),
    ("query", "document"),
    ("query", "passage"),
    ("query", "answer"),
    ("question", "passage"),
    ("question", "answer"),
    ("question", "sentence"),
)
_PROMPT_NAMES = (
    ("prompt", "completion"),
    ("prompt", "response"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("question", "answer"),
    ("query", "response"),
    ("input", "output"),
)
_OF_PLAIN_TEXT = {DECODER: "language_modeling", ENCODER: "masked_language_modeling"}
_TARGET_NAMES = {
    "summarization": ("summary", "highlights", "abstract", "tldr"),
    "translation": ("target", "translation", "tgt"),
}


@dataclass
class Guess:
    """``settings``: keys of :class:`DataSettings`, the task first; ``reasons``: of some of them, a few words;
    ``checks``: sentences on what may be wrong or odd, for whoever knows the data."""

    settings: dict[str, Any]
    reasons: dict[str, str] = field(default_factory=dict)
    checks: list[str] = field(default_factory=list)

    def add(self, reason: str = "", **settings: Any) -> None:
        """Settings that are not set yet, and why."""
        for name, value in settings.items():
            self.settings.setdefault(name, value)
            if reason:
                self.reasons.setdefault(name, reason)


def guess(
    rows: Dataset, given: Mapping[str, Any], architecture: str, *, embeds: bool = False, has_chat: bool = False
) -> Guess:
    """Settings for training on ``rows``.

    Args:
        rows: Of the training data.
        given: Keys of :class:`DataSettings` that are settled.
        architecture: Of the model, as :func:`architecture_of` says.
        embeds: Whether the model was made to compare texts, as one of sentence-transformers.
        has_chat: Whether its tokenizer has a chat template.

    Raises:
        UserError: nothing of the rows can be learnt, or it takes a person to say what.
    """
    for setting, name in given.items():
        if setting.endswith(("_column", "_columns")) and name is not None:
            for column in name if isinstance(name, list) else [name]:
                rows = with_fields(rows, [column])
                require_column(rows, column, setting, "train")
    table = _Table(rows)
    task = given.get("task") or _task(table, given, architecture, embeds)
    found = Guess({"task": task})
    found.settings |= {name: value for name, value in given.items() if name != "task"}
    _COLUMNS[task](table, found, has_chat)
    changes, odd = odd_rows(rows, found.settings)
    found.add("see the notes", **changes)
    found.checks += odd
    unused = [name for name in rows.column_names if name not in _used(found.settings)]
    if unused:
        found.checks.append(f"Not used: {_quoted(unused)}.")
    return found


def _used(settings: Mapping[str, Any]) -> set[str]:
    """Columns that ``settings`` name, alone, as a field of a record or in a template, and those that a task reads by
    their own names."""
    columns = {name for key, name in settings.items() if key.endswith("_column") and name is not None}
    columns |= {*(settings.get("label_columns") or ()), *_OWN_NAMES.get(settings["task"], ("label",))}
    for key in ("template", "template_without_input"):
        columns |= set(Template.parse(settings[key], key).columns) if settings.get(key) else set()
    return columns | {name.partition(".")[0] for name in columns}


_OWN_NAMES = {
    "question_answering": ("question", "context", "answers"),
    "instruction_tuning": (*MESSAGES, "prompt", "completion"),
}


class _Table:
    """What is in the columns of the first rows."""

    def __init__(self, rows: Dataset) -> None:
        self.rows = rows.select(range(min(len(rows), _SAMPLE)))
        self.features = rows.features
        self._cells: dict[str, list[Any]] = {}

    def cells(self, name: str) -> list[Any]:
        """Those of a column, or of a field of a record, that are not blank."""
        if name not in self._cells:
            values = with_fields(self.rows, [name])[name][:]
            self._cells[name] = [value for value in values if not is_blank(value)]
        return self._cells[name]

    @cached_property
    def texts(self) -> list[str]:
        """Columns of text that is no id, label or number: the likeliest to be the text first."""
        names = [name for name in self.features if is_text(self.features[name]) and not self.is_number(name)]
        names = [name for name in names if name.lower() not in _ID_NAMES and self.cells(name)]
        return sorted(names, key=lambda name: (_place(name, _TEXT_NAMES), -self.length(name)))

    @cached_property
    def labels(self) -> list[str]:
        """Columns that may hold one label or number per row, the likeliest first."""
        names = [name for name, kind in self.features.items() if isinstance(kind, ClassLabel | Value)]
        names = [name for name in names if name.lower() not in _ID_NAMES and self.repeats(name)]
        return sorted(names, key=lambda name: _place(name, _LABEL_NAMES))

    @cached_property
    def label(self) -> str | None:
        """The likeliest of :attr:`labels`: the only one, or the one that is called so; with names beside numbers the
        names."""
        if not self.labels or (len(self.labels) > 1 and self.labels[0].lower() not in _LABEL_NAMES):
            return None
        named = (name for name in self.labels if self._names(name, self.labels[0]))
        return next(named, self.labels[0])

    def _names(self, texts: str, numbers: str) -> bool:
        """Whether a column of text has a name for each number of another column."""
        if texts == numbers or not is_text(self.features[texts]) or not self.is_number(numbers):
            return False
        both = {(as_text(a), as_text(b)) for a, b in zip(self.rows[texts][:], self.rows[numbers][:], strict=True)}
        return len(both) == len({a for a, _ in both}) == len({b for _, b in both})

    def length(self, name: str) -> float:
        """Mean number of characters."""
        cells = self.cells(name)
        return sum(len(str(value)) for value in cells) / max(1, len(cells))

    def is_number(self, name: str) -> bool:
        """Whether all cells that are filled hold numbers, as text or not."""
        kind = self.features[name]
        if isinstance(kind, ClassLabel) or not isinstance(kind, Value) or kind.dtype == "bool":
            return False
        return all(_is_number(value) for value in self.cells(name))

    def is_flag(self, name: str) -> bool:
        """Whether the cells say 0 or 1, both of them, or are truth values."""
        truth = getattr(self.features[name], "dtype", None) == "bool"
        return truth or {as_text(value) for value in self.cells(name)} == {"0", "1"}

    def repeats(self, name: str) -> bool:
        """Whether the cells look like labels or numbers to learn: short texts that recur, or numbers but no ids."""
        cells, kind = self.cells(name), self.features[name]
        different = {as_text(value) for value in cells}
        named = name.lower() in _LABEL_NAMES
        if len(different) < 2:
            return False
        if isinstance(kind, ClassLabel):
            return True
        if self.is_number(name):
            counts_up = len(different) == len(cells) and all(float(value).is_integer() for value in cells)
            return named or not counts_up
        if not is_text(kind):
            return kind.dtype == "bool"
        short = self.length(name) <= _LABEL_CHARACTERS
        return short and (named or len(different) <= max(2, len(cells) // 4))

    def of_kind(self, fits: Callable[[Any], bool]) -> list[str]:
        return [name for name, kind in self.features.items() if fits(kind)]

    def pair(self, names: Sequence[tuple[str, str]]) -> tuple[str, str] | None:
        """The first of ``names`` of which both are columns of text."""
        own = {name.lower(): name for name in self.of_kind(is_text)}
        return next(((own[one], own[two]) for one, two in names if one in own and two in own), None)


# ------------------------------------------------------------------------------------------------ which task


def _task(table: _Table, given: Mapping[str, Any], architecture: str, embeds: bool) -> str:
    told = _told(table, given)
    if told is not None:
        return told
    if architecture == IMAGE:
        return "image_classification"
    if architecture == ENCODER_DECODER and _source_and_target(table) is not None:
        return _source_and_target(table)[0]  # type: ignore[index]
    if architecture == DECODER and (table.of_kind(is_conversation) or table.pair(_PROMPT_NAMES)):
        return "instruction_tuning"
    if architecture == ENCODER and table.of_kind(_is_answers) and {"question", "context"} <= set(table.features):
        return "question_answering"
    if _tokens_and_tags(table) is not None:
        return "token_classification"
    if architecture == ENCODER and _compares(table, embeds):
        return "embedding"
    if _label_lists(table) or _separator(table, given) or (table.label is None and _flags(table)):
        return "multi_label_classification"
    label = given.get("label_column") or table.label
    if label is not None:
        return "regression" if _is_amount(table, label) else "classification"
    if len(table.texts) == 1 and architecture in _OF_PLAIN_TEXT:
        return _OF_PLAIN_TEXT[architecture]
    raise UserError(
        f"It cannot be told what is to be learnt from the columns {_quoted(table.features)}"
        + (f": {_quoted(table.labels)} may all be labels" if len(table.labels) > 1 else "")
        + ". Say it: --label_column NAME, or --task with one of: "
        f"{', '.join(_COLUMNS)}."
    )


def _told(table: _Table, given: Mapping[str, Any]) -> str | None:
    """The task where a setting that is given goes with one only."""
    named = {name for name, value in given.items() if value is not None}
    if "label_columns" in named:
        columns = given["label_columns"]
        amounts = all(map(table.is_number, columns)) and not all(map(table.is_flag, columns))
        return "regression" if amounts else "multi_label_classification"
    return next((task for names, task in _TOLD_BY.items() if named & set(names)), None)


_TOLD_BY = {
    ("messages_column", "prompt_column", "completion_column", "template"): "instruction_tuning",
    ("label_separator",): "multi_label_classification",
    ("negative_column",): "embedding",
}


def _compares(table: _Table, embeds: bool) -> bool:
    """Pairs of texts for a model of embeddings: with scores, or without anything else to learn."""
    if len(table.texts) < 2 and table.pair(_PAIR_NAMES) is None:
        return False
    return (embeds and (table.label is None or table.is_number(table.label))) or not table.labels


def _is_amount(table: _Table, label: str) -> bool:
    """Whether the numbers of a column are more than numbers of classes."""
    if not table.is_number(label):
        return False
    values = {float(value) for value in table.cells(label)}
    numbered = values == set(range(len(values))) and len(table.cells(label)) >= 5 * len(values)
    return not numbered and (len(values) > _CLASSES or not all(value.is_integer() for value in values))


def _flags(table: _Table) -> list[str]:
    """Two or more columns that say 0 or 1 of every row."""
    found = [name for name, kind in table.features.items() if isinstance(kind, Value) and table.is_flag(name)]
    return found if len(found) > 1 else []


def _label_lists(table: _Table) -> list[str]:
    found = table.of_kind(lambda kind: isinstance(getattr(kind, "feature", None), ClassLabel | Value))
    return sorted(found, key=lambda name: _place(name, _LABEL_NAMES)) if table.texts else []


def _separator(table: _Table, given: Mapping[str, Any]) -> str | None:
    """What parts labels in the cells of a column of text, where splitting leaves fewer that recur more often."""
    named = given.get("label_column") or next((n for n in table.features if n.lower() in _LABEL_NAMES), table.label)
    if named is None or not is_text(table.features.get(named)):
        return None
    cells = table.cells(named)
    for separator in _SEPARATORS:
        parted = [[part.strip() for part in cell.split(separator) if part.strip()] for cell in cells]
        parts = {part for row in parted for part in row}
        several = sum(len(row) > 1 for row in parted)
        if several >= len(cells) / 10 and len(parts) < len(set(cells)) and len(parts) <= max(2, len(cells) // 2):
            return separator
    return None


def _tokens_and_tags(table: _Table) -> tuple[str, str] | None:
    """Two columns of lists that are equally long in every row; words are the ones that differ more."""
    lists = table.of_kind(lambda kind: isinstance(getattr(kind, "feature", None), ClassLabel | Value))
    for words in (name for name in lists if is_list_of_text(table.features[name])):
        for tags in (name for name in lists if name != words):
            rows = list(zip(table.rows[words][:], table.rows[tags][:], strict=True))
            if not all(isinstance(a, list) and isinstance(b, list) and len(a) == len(b) for a, b in rows):
                continue
            sizes = [len({str(value) for row in rows for value in row[side]}) for side in (0, 1)]
            if sizes[1] < sizes[0] and max(len(row[0]) for row in rows) > 1:
                return words, tags
    return None


def _is_answers(kind: Any) -> bool:
    return isinstance(kind, dict) and {"text", "answer_start"} <= set(kind)


def _source_and_target(table: _Table) -> tuple[str, str, str] | None:
    """(task, source, target) of two texts, the shorter one written from the longer, or both about equally long."""
    fields = [name for name in names_with_fields(table.rows) if "." in name]
    texts = fields if len(fields) == 2 else table.of_kind(is_text)
    for task, names in _TARGET_NAMES.items():
        target = next((name for name in texts if name.lower() in names), None)
        others = [name for name in texts if name != target and name.lower() not in _ID_NAMES]
        if target is not None and others:
            return task, max(others, key=table.length), target
    if len(texts) != 2 or (table.label is not None and not fields):
        return None
    source, target = texts if fields else sorted(texts, key=table.length, reverse=True)
    alike = table.length(target) > table.length(source) / 2
    return ("translation", texts[0], texts[1]) if alike else ("summarization", source, target)


# ------------------------------------------------------------------------------------------------ which columns


def _text_and_label(table: _Table, found: Guess, has_chat: bool) -> None:
    given, task = found.settings, found.settings["task"]
    if task == "multi_label_classification":
        _labels_of_row(table, found)
    elif given.get("label_column") is None and "label_columns" not in given:
        if table.label is None:
            raise UserError(f"No column of {_quoted(table.features)} looks like labels. Say it: --label_column NAME.")
        found.add(label_column=table.label)
    _text_beside(table, found)
    label = given.get("label_column")
    if task == "classification" and label is not None and table.is_number(label):
        found.checks.append(
            f"{label!r} holds whole numbers, which are taken for classes. If they are amounts or an order, set task: "
            "regression."
        )


def _labels_of_row(table: _Table, found: Guess) -> None:
    """A column of lists, or of text with several labels, or columns of 0 and 1."""
    given = found.settings
    lists, separator = _label_lists(table), _separator(table, given)
    if "label_columns" in given or "label_column" in given and not is_text(table.features.get(given["label_column"])):
        return
    if lists and "label_column" not in given:
        found.add(label_column=lists[0])
    elif separator is not None or "label_column" in given:
        named = next((name for name in table.features if name.lower() in _LABEL_NAMES), None)
        found.add(label_column=named or table.label)
        found.add("stands between labels", label_separator=separator or ",")
    elif _flags(table):
        found.add("each says 0 or 1", label_columns=_flags(table))
    else:
        raise UserError(
            f"No column of {_quoted(table.features)} looks like lists of labels. Say it: --label_column NAME, with "
            "--label_separator where it is text, or --label_columns NAME NAME …"
        )


def _text_beside(table: _Table, found: Guess) -> None:
    """The text, or two, that have the labels."""
    given = found.settings
    if "text_column" in given:
        return
    taken = {given.get("label_column"), *(given.get("label_columns") or ())}
    pair, texts = table.pair(_PAIR_NAMES), [name for name in table.texts if name not in taken]
    if pair is not None and not taken & set(pair):
        found.add("read together", text_column=pair[0], text_pair_column=pair[1])
        return
    if not texts:
        raise UserError(f"No column of {_quoted(table.features)} looks like text. Say it: --text_column NAME.")
    found.add(text_column=texts[0])
    if len(texts) > 1 and table.length(texts[1]) > _LABEL_CHARACTERS / 2:
        found.checks.append(
            f"Only {texts[0]!r} is read. For two texts together add text_pair_column: {_yaml_name(texts[1])}."
        )


def _pictures(table: _Table, found: Guess, has_chat: bool) -> None:
    images = table.of_kind(is_image)
    if table.label is None or not images:
        raise UserError(
            f"Of the columns {_quoted(table.features)} no one looks like {'labels' if images else 'images'}. Say it: "
            "--label_column NAME, --image_column NAME; or give a folder with a sub-folder of images for each label."
        )
    found.add(image_column=images[0], label_column=table.label)


def _pairs(table: _Table, found: Guess, has_chat: bool) -> None:
    given = found.settings
    score = given.get("label_column") or (table.label if table.label and table.is_number(table.label) else None)
    texts = [name for name in table.of_kind(is_text) if name in table.texts and name != score]
    pair = table.pair(_PAIR_NAMES) or (tuple(texts[:2]) if len(texts) > 1 else None)
    if pair is None and not {"text_column", "text_pair_column"} <= set(given):
        raise UserError(
            f"task: embedding compares two texts, and of {_quoted(table.features)} only {_quoted(texts) or 'none'} "
            "look like text. Say it: --text_column NAME --text_pair_column NAME."
        )
    if pair is not None:
        found.add(text_column=pair[0], text_pair_column=pair[1])
    if score is not None:
        found.add("how alike the two texts are", label_column=score)
        return
    third = next((name for name in texts if "negative" in name.lower()), None)
    if third is not None:
        found.add("not like the first text", negative_column=third)
    found.checks.append(
        f"{given['text_column']!r} and {given['text_pair_column']!r} are taken for texts that belong together; those "
        "of other rows of a batch for texts that do not."
    )


def _words(table: _Table, found: Guess, has_chat: bool) -> None:
    pair = _tokens_and_tags(table)
    if pair is not None:
        found.add(text_column=pair[0], label_column=pair[1])


def _answers(table: _Table, found: Guess, has_chat: bool) -> None:
    names = [name for name in table.of_kind(_is_answers) if name != "answers"]
    if names and "answers" not in table.features:
        found.add(label_column=names[0])


def _plain_text(table: _Table, found: Guess, has_chat: bool) -> None:
    if table.texts:
        found.add(text_column=table.texts[0])
    if found.settings["task"] == _OF_PLAIN_TEXT[ENCODER]:
        found.checks.append(
            "No labels: the model learns to fill gaps in these texts, as before it is tuned for a task."
        )


def _prompts(table: _Table, found: Guess, has_chat: bool) -> None:
    given = found.settings
    of_prompts = {"prompt_column", "completion_column", "template"} & set(given)
    conversations = sorted(table.of_kind(is_conversation), key=lambda name: _place(name, MESSAGES))
    if conversations and not of_prompts:
        found.add(messages_column=conversations[0])
        return
    pair = table.pair(_PROMPT_NAMES)
    if pair is None and not of_prompts and "messages_column" not in given:
        raise UserError(
            f"No columns of {_quoted(table.features)} look like prompts and completions, or like messages with role "
            "and content. Say it: --prompt_column NAME --completion_column NAME."
        )
    if pair is not None and "template" not in given and "messages_column" not in given:
        found.add(prompt_column=pair[0], completion_column=pair[1])
        further = next((name for name in table.of_kind(is_text) if name.lower() == "input" and name not in pair), None)
        if further is not None:
            found.add("may be empty", input_column=further)
    if has_chat and "template" not in given and "messages_column" not in given:
        found.add("the tokenizer has one, so the model was tuned with it", use_chat_template=True)


def _targets(table: _Table, found: Guess, has_chat: bool) -> None:
    told = _source_and_target(table)
    if told is not None:
        found.add(text_column=told[1], target_column=told[2])


_COLUMNS: dict[str, Callable[[_Table, Guess, bool], None]] = {
    "classification": _text_and_label,
    "multi_label_classification": _text_and_label,
    "regression": _text_and_label,
    "image_classification": _pictures,
    "embedding": _pairs,
    "token_classification": _words,
    "question_answering": _answers,
    "language_modeling": _plain_text,
    "masked_language_modeling": _plain_text,
    "instruction_tuning": _prompts,
    "summarization": _targets,
    "translation": _targets,
}


# ------------------------------------------------------------------------------------------------ words


def _quoted(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names))


def _yaml_name(name: str) -> str:
    return name if name.replace("_", "").isalnum() else repr(name)


def _place(name: str, names: Sequence[str]) -> int:
    return names.index(name.lower()) if name.lower() in names else len(names)


def _is_number(value: Any) -> bool:
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return not isinstance(value, bool)
