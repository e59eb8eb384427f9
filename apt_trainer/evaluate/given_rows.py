"""Rows that a finished model is to predict: from texts or files to the columns that it reads, by its own settings.

Those are the settings of the run where the folder has its recipe, else what the config tells. Not for predictions.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from datasets import Dataset, Image

from apt_trainer.errors import UserError
from apt_trainer.models.labels import (
    IMAGE_HEAD,
    MULTI_LABEL,
    REGRESSION,
    SEQUENCE_HEAD,
    SINGLE_LABEL,
    TOKEN_HEAD,
    has_head,
    problem_type,
)
from apt_trainer.settings import DataSettings, ModelSettings, resolve_path
from apt_trainer.store.events import RECIPE_FILE
from apt_trainer.store.pretrained import compares_texts, max_positions, source_of
from apt_trainer.tasks.base import Columns, is_list_of_text, is_text
from apt_trainer.tasks.images import is_image
from apt_trainer.tasks.loading import PLAIN_TEXT, is_image_file, read_file, text_of
from apt_trainer.tasks.prompts import MESSAGES, PromptColumns, columns_of_prompts

OF_LABELS = {
    SINGLE_LABEL: "classification",
    MULTI_LABEL: "multi_label_classification",
    REGRESSION: "regression",
}
IMAGES = "image_classification"
_OF_FORM = {"messages_column", "prompt_column", "completion_column", "template", "use_chat_template"}
_LONGEST = 100_000  # what tokenizers without a limit say is more


class GivenRows:
    """Reads rows for a model by ``data``, the settings of its task.

    ``converses``: whether a text is a turn of a conversation where no column is named.
    """

    def __init__(self, data: DataSettings, converses: bool = False) -> None:
        self.data, self.converses = data, converses

    def rows_of_texts(self, texts: Sequence[str], pairs: Sequence[str] | None) -> Dataset:
        """Rows as this model reads them, of texts and where it takes two, their ``pairs``."""
        if pairs is not None and len(pairs) != len(texts):
            raise UserError(f"{len(texts)} texts and {len(pairs)} second texts were given. Give as many of each.")
        data = self.data
        if data.task == IMAGES:
            raise UserError(
                "The model takes images. Give --file: an image, a folder of images, or a file with a column."
            )
        if data.task == "instruction_tuning":
            columns = self.prompt_columns(())
            if columns.messages is not None:
                return Dataset.from_dict({columns.messages: [[{"role": "user", "content": t}] for t in texts]})
            names = [name for name in columns.names if name != columns.completion]
            return Dataset.from_dict({names[0]: list(texts)} | {n: [""] * len(texts) for n in names[1:]})
        rows: dict[str, list[Any]] = {self._text_name(): list(texts)}
        if data.task == "token_classification":
            rows = {self._text_name(): [text.split() for text in texts]}
        if pairs is not None:
            rows[self._pair_name()] = list(pairs)
        return Dataset.from_dict(rows)

    def read(self, path: str) -> Dataset:
        """Rows of a file; of a txt file one a line, of an image file or a folder of such the ``image`` files."""
        place = Path(resolve_path(path)).expanduser()
        if self.data.task == IMAGES and (place.is_dir() or is_image_file(place)):
            files = [place] if place.is_file() else [file for file in sorted(place.rglob("*")) if is_image_file(file)]
            if not files:
                raise UserError(f"file={path!r} is a folder without image files.")
            return Dataset.from_dict({"image": [str(file) for file in files]}).cast_column("image", Image())
        if place.suffix.lower() == PLAIN_TEXT and place.is_file():
            text = text_of(place, "file")
            if not text:
                raise UserError(f"file={path!r} has no rows. Give data with at least one row.")
            # not splitlines, which ends lines at characters that stand within a text
            return self.rows_of_texts(text.removesuffix("\n").split("\n"), None)
        return read_file(path, "file", "")

    def _text_name(self) -> str:
        names = {"token_classification": "tokens", "question_answering": "question"}
        return self.data.text_column or names.get(self.data.task, "text")

    def _pair_name(self) -> str:
        return self.data.text_pair_column or {"question_answering": "context"}.get(self.data.task, "text_pair")

    def prompt_columns(self, present: Sequence[str]) -> PromptColumns:
        data = self.data
        chat = next((name for name in MESSAGES if name in present), None)
        if self.converses and "prompt" not in present:  # nor does the recipe tell which of the two forms it was
            chat = chat or MESSAGES[0]
        if data.messages_column or (chat and not (data.prompt_column or data.template)):
            return PromptColumns(messages=data.messages_column or chat)
        if data.prompt_column is None and data.template is None and "prompt" not in present and "text" in present:
            data = replace(data, prompt_column="text")
        return columns_of_prompts(data)

    def columns(self, rows: Dataset) -> tuple[list[str], list[str]]:
        """Names of the columns that are read, and of those that may be absent."""
        present, task = rows.column_names, self.data.task
        if task == "instruction_tuning":
            columns = self.prompt_columns(present)
            names = [name for name in columns.names if name != columns.completion or columns.messages]
            return [name for name in names if name != columns.input], [columns.input] if columns.input else []
        text = self._text_name()
        if text not in present and self.data.text_column is None:
            fits = is_list_of_text if task == "token_classification" else is_text
            found = [name for name, kind in rows.features.items() if fits(kind) and name != self.data.label_column]
            text = found[0] if len(found) == 1 else text
        pair = self._pair_name()
        if task == "question_answering" or (self.data.text_pair_column is not None and task != "embedding"):
            return [text, pair], []
        return [text], [pair]

    def image_column(self, rows: Dataset) -> str:
        """Name of the column with images."""
        if self.data.image_column is not None and self.data.image_column in rows.column_names:
            return self.data.image_column
        found = [name for name, kind in rows.features.items() if is_image(kind)]
        if len(found) != 1:
            raise UserError(
                f"{len(found)} columns of the data to predict hold images ({', '.join(rows.column_names)}). Set "
                "image_column."
            )
        return found[0]

    def text_columns(self, rows: Dataset) -> Columns:
        columns, optional = self.columns(rows)
        names = [*columns, *(name for name in optional if name in rows.column_names)]
        return Columns(names[0], names[1] if len(names) > 1 else None, "")


def given_rows(model: ModelSettings, config: Any, tokenizer: Any, given: Mapping[str, Any]) -> GivenRows:
    """With the settings of the run that made the model, else with what its config tells; ``given`` ones stand."""
    known = {f.name for f in fields(DataSettings)}
    file = Path(source_of(model).path) / RECIPE_FILE
    values: dict[str, Any] = {}
    converses = False
    if file.is_file():
        recipe = json.loads(file.read_text(encoding="utf-8"))
        values = {name: value for name, value in recipe.items() if name in known}
        values.setdefault("task", DataSettings.task)
        if values["task"] == "masked_language_modeling":
            raise _tells_nothing(str(model.model_name_or_path), "model that fills gaps")
        if values["task"] == "language_modeling":
            values |= {"task": "instruction_tuning", "prompt_column": values.get("text_column") or "text"}
        unnamed = values["task"] == "instruction_tuning" and not _OF_FORM & {*values, *given}
        converses = unnamed and bool(getattr(tokenizer, "chat_template", None))
    else:
        longest = (getattr(tokenizer, "model_max_length", _LONGEST), max_positions(config) or _LONGEST, _LONGEST)
        values = {"task": _task_of(config, model), "max_length": min(longest)}
        values["use_chat_template"] = bool(getattr(tokenizer, "chat_template", None))
    data = DataSettings(**{**values, **given})
    if data.task == "masked_language_modeling":
        raise UserError(
            f"{model.model_name_or_path} predicts masked tokens, which tells nothing of a text. Fine-tune it for a "
            "task."
        )
    return GivenRows(data, converses)


def _task_of(config: Any, model: ModelSettings) -> str:
    """The task that a model was trained for, as far as its head tells."""
    if has_head(config, SEQUENCE_HEAD):
        return OF_LABELS[problem_type(config)]
    if has_head(config, IMAGE_HEAD):
        return "image_classification"
    if has_head(config, TOKEN_HEAD):
        return "token_classification"
    if has_head(config, "ForQuestionAnswering"):
        return "question_answering"
    if getattr(config, "is_encoder_decoder", False):
        return "summarization"
    name = (getattr(config, "apt_base_architecture", None) or (config.architectures or [""])[0]) or ""
    if name.endswith(("ForCausalLM", "LMHeadModel")):
        return "instruction_tuning"
    if name.endswith("Model") or compares_texts(model):
        return "embedding"
    raise _tells_nothing(str(model.model_name_or_path), name or "model of an unknown class")


def _tells_nothing(path: str, kind: str) -> UserError:
    return UserError(
        f"{path} is a {kind}, which has not been trained to tell anything of a text. Give a fine-tuned model, or a "
        "model of embeddings."
    )
