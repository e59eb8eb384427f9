"""What a finished model, pruned or not, says of texts: labels, numbers, tags, answers, embeddings, continuations.

Texts are encoded as the tasks encode them, with the settings of the run where the folder has its recipe. Not for
scores on labelled data (``runs.run``), nor for conversations (``generation``).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from apt_trainer.errors import UserError
from apt_trainer.evaluate.generation import Generator
from apt_trainer.libraries import versions
from apt_trainer.models.labels import (
    MULTI_LABEL,
    REGRESSION,
    SEQUENCE_HEAD,
    SINGLE_LABEL,
    TOKEN_HEAD,
    has_head,
    names_of,
    problem_type,
)
from apt_trainer.models.pooling import mean_pooling
from apt_trainer.settings import DataSettings, ModelSettings, resolve_path
from apt_trainer.settings.packages import SENTENCE_TRANSFORMERS, check_packages, require
from apt_trainer.store.events import RECIPE_FILE
from apt_trainer.store.pretrained import (
    choose_device,
    load_saved,
    load_tokenizer,
    max_positions,
    read_config,
    source_of,
)
from apt_trainer.tasks.base import Columns, check_name, is_list_of_text, is_text, right_padding
from apt_trainer.tasks.classification import encode_texts
from apt_trainer.tasks.instruction_tuning import prompt_encoder
from apt_trainer.tasks.loading import PLAIN_TEXT, read_file
from apt_trainer.tasks.nested import with_fields
from apt_trainer.tasks.prompts import MESSAGES, PromptColumns, columns_of_prompts
from apt_trainer.tasks.question_answering import SPAN_COLUMNS, best_answers, features_of
from apt_trainer.tasks.tokens import encode_words, word_prefix

logger = logging.getLogger(__name__)

_OF_LABELS = {
    SINGLE_LABEL: "classification",
    MULTI_LABEL: "multi_label_classification",
    REGRESSION: "regression",
}
_LONGEST = 100_000  # what tokenizers without a limit say is more
_OF_SENTENCE_TRANSFORMERS = "modules.json"
Prediction = dict[str, Any]


@dataclass(frozen=True)
class PredictOptions:
    """How to predict: ``batch_size`` rows at a time, on ``device``, ``max_new_tokens`` where the model writes."""

    batch_size: int = 32
    device: str | None = None
    max_new_tokens: int = 128


class Predictor:
    """A saved model and how it reads rows.

    Args:
        model: Which one.
        given: Keys of :class:`DataSettings` that are settled; others are those of the run that made the model.
        options: How to predict.

    Raises:
        UserError: there is no such model, or it has no head to predict with.
    """

    def __init__(self, model: ModelSettings, given: Mapping[str, Any], options: PredictOptions) -> None:
        check_packages(vars(model))
        self.model_settings, self.options = model, options
        self.config = read_config(model)
        self.tokenizer = load_tokenizer(model)
        self.data = _data_settings(model, self.config, self.tokenizer, given)
        self.device = choose_device(options.device)

    def rows_of_texts(self, texts: Sequence[str], pairs: Sequence[str] | None) -> Dataset:
        """Rows as this model reads them, of texts and where it takes two, their ``pairs``."""
        if pairs is not None and len(pairs) != len(texts):
            raise UserError(f"{len(texts)} texts and {len(pairs)} second texts were given. Give as many of each.")
        data = self.data
        if data.task == "instruction_tuning":
            columns = self._prompt_columns(())
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
        """Rows of a file; of a txt file one a line."""
        place = Path(resolve_path(path)).expanduser()
        if place.suffix.lower() == PLAIN_TEXT and place.is_file():
            lines = place.read_text(encoding="utf-8").splitlines()
            if not lines:
                raise UserError(f"file={path!r} has no rows. Give data with at least one row.")
            return self.rows_of_texts(lines, None)
        return read_file(path, "file", "")

    def predict(self, rows: Dataset) -> Iterator[Prediction]:
        """One prediction a row, in their order: ``row``, the texts that were read by their columns, what was found.

        A row without text has an ``error`` in place of what was found.
        """
        columns, optional = self._columns(rows)
        named = [*columns, *(name for name in optional if name in rows.column_names)]
        rows = with_fields(rows, named)
        for name in columns:
            check_name(rows, name, f"The data to predict have no column {name!r}.")
        cells = [rows[name][:] for name in columns]
        filled = [row for row, values in enumerate(zip(*cells, strict=True)) if not any(map(_is_empty, values))]
        if len(filled) < len(rows):
            logger.warning("%d of %d rows have no text and are not predicted.", len(rows) - len(filled), len(rows))
        found = self._found(rows.select(filled)) if filled else iter(())
        have_text = set(filled)
        for number in range(len(rows)):
            texts = {name: rows[number][name] for name in named}
            yield {"row": number, **texts, **(next(found) if number in have_text else {"error": "no text"})}

    # ------------------------------------------------------------------ columns

    def _text_name(self) -> str:
        names = {"token_classification": "tokens", "question_answering": "question"}
        return self.data.text_column or names.get(self.data.task, "text")

    def _pair_name(self) -> str:
        return self.data.text_pair_column or {"question_answering": "context"}.get(self.data.task, "text_pair")

    def _prompt_columns(self, present: Sequence[str]) -> PromptColumns:
        data = self.data
        chat = next((name for name in MESSAGES if name in present), None)
        if data.messages_column or (chat and not (data.prompt_column or data.template)):
            return PromptColumns(messages=data.messages_column or chat)
        if data.prompt_column is None and data.template is None and "prompt" not in present and "text" in present:
            data = replace(data, prompt_column="text")
        return columns_of_prompts(data)

    def _columns(self, rows: Dataset) -> tuple[list[str], list[str]]:
        """Names of the columns that are read, and of those that may be absent."""
        present, task = rows.column_names, self.data.task
        if task == "instruction_tuning":
            columns = self._prompt_columns(present)
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

    # ------------------------------------------------------------------ predictions

    def _found(self, rows: Dataset) -> Iterator[Prediction]:
        task = self.data.task
        if task in _OF_LABELS.values():
            return self._classes(rows)
        if task == "token_classification":
            return self._tags(rows)
        if task == "question_answering":
            return iter(self._answers(rows))
        if task == "embedding":
            return self._embeddings(rows)
        return self._written(rows)

    def _loaded(self) -> Any:
        return load_saved(self.model_settings).to(self.device).eval()

    def _batches(self, rows: Dataset) -> Iterator[dict[str, list[Any]]]:
        yield from rows.iter(batch_size=self.options.batch_size)

    def _outputs(self, model: Any, encoded: Mapping[str, Any]) -> Any:
        names = self.tokenizer.model_input_names
        padder = right_padding(self.tokenizer)
        if padder.pad_token is None:
            padder.pad_token = padder.eos_token
            model.config.pad_token_id = padder.pad_token_id
        batch = padder.pad({name: encoded[name] for name in names if name in encoded}, return_tensors="pt")
        with torch.inference_mode():
            return model(**batch.to(self.device))

    def _text_columns(self, rows: Dataset) -> Columns:
        columns, optional = self._columns(rows)
        names = [*columns, *(name for name in optional if name in rows.column_names)]
        return Columns(names[0], names[1] if len(names) > 1 else None, "")

    def _classes(self, rows: Dataset) -> Iterator[Prediction]:
        model, names, columns = self._loaded(), names_of(self.config), self._text_columns(rows)
        for batch in self._batches(rows):
            encoded = encode_texts(batch, self.tokenizer, columns, self.data.max_length)
            logits = self._outputs(model, encoded).logits.float().cpu()
            yield from (_of_logits(row, names, self.data.task) for row in logits)

    def _tags(self, rows: Dataset) -> Iterator[Prediction]:
        model, names, column = self._loaded(), names_of(self.config), self._text_columns(rows).text
        prefix = word_prefix(self.tokenizer)
        for batch in self._batches(rows):
            encoded, begun = encode_words(batch[column], self.tokenizer, prefix, self.data.max_length)
            shares = self._outputs(model, encoded).logits.float().softmax(-1).cpu()
            for words, of_row, numbers in zip(batch[column], shares, begun, strict=True):
                tags = [(words[w], of_row[place]) for place, w in enumerate(numbers) if w is not None]
                yield {"tags": [{"word": word, **_likeliest(share, names)} for word, share in tags]}

    def _answers(self, rows: Dataset) -> list[Prediction]:
        model, columns = self._loaded(), self._text_columns(rows)
        assert columns.text_pair is not None
        features = features_of(rows.select_columns(columns.names[:2]), columns, self.data, self.tokenizer)
        starts, ends = [], []
        for batch in self._batches(features):
            outputs = self._outputs(model, batch)
            starts += list(outputs.start_logits.float().cpu().numpy())
            ends += list(outputs.end_logits.float().cpu().numpy())
        contexts = rows[columns.text_pair][:]
        spans = features.select_columns(SPAN_COLUMNS)
        answers = best_answers(_even(starts), _even(ends), spans, contexts, null_allowed=True)
        return [{"answer": answer} for answer in answers]

    def _embeddings(self, rows: Dataset) -> Iterator[Prediction]:
        embed, columns = self._embedder(), self._text_columns(rows)
        for batch in self._batches(rows):
            first = embed(batch[columns.text])
            if columns.text_pair is None:
                yield from ({"embedding": vector.tolist()} for vector in first)
                continue
            second = embed(batch[columns.text_pair])
            cosines = torch.nn.functional.cosine_similarity(first, second, dim=-1)
            yield from ({"similarity": cosine} for cosine in cosines.tolist())

    def _embedder(self) -> Any:
        """From texts to embeddings [texts, d]: as sentence-transformers says where the folder is one of its, else the
        mean of hidden states."""
        path = source_of(self.model_settings).path
        if (Path(path) / _OF_SENTENCE_TRANSFORMERS).is_file():
            require(SENTENCE_TRANSFORMERS, f"{path} is a model of sentence-transformers and")
            versions.check_versions(versions.SENTENCE_TRANSFORMERS)
            from sentence_transformers import SentenceTransformer

            model = SentenceTransformer(path, device=str(self.device))
            return lambda texts: model.encode(texts, convert_to_tensor=True, show_progress_bar=False).float().cpu()
        plain = self._loaded()

        def embed(texts: list[str]) -> torch.Tensor:
            encoded = self.tokenizer(texts, truncation=True, max_length=self.data.max_length)
            hidden = self._outputs(plain, encoded).last_hidden_state
            mask = [[1] * len(ids) + [0] * (hidden.shape[1] - len(ids)) for ids in encoded["input_ids"]]
            return mean_pooling(hidden, {"attention_mask": torch.tensor(mask)}).cpu()

        return embed

    def _written(self, rows: Dataset) -> Iterator[Prediction]:
        generator = Generator(self._loaded(), self.tokenizer, self.options.max_new_tokens)
        if self.config.is_encoder_decoder:
            column, data = self._text_columns(rows).text, self.data

            def encode(row: dict[str, Any]) -> list[int]:
                text = data.source_prefix + row[column]
                return list(self.tokenizer(text, truncation=True, max_length=data.max_length).input_ids)
        else:
            encode = prompt_encoder(self._prompt_columns(rows.column_names), self.data, self.tokenizer)
        for batch in self._batches(rows):
            cells = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
            texts = generator.write([encode(row) for row in cells])
            yield from ({"generated": text} for text in texts)


def _data_settings(model: ModelSettings, config: Any, tokenizer: Any, given: Mapping[str, Any]) -> DataSettings:
    """Those of the run that made the model, else what its config tells."""
    known = {f.name for f in fields(DataSettings)}
    file = Path(source_of(model).path) / RECIPE_FILE
    values: dict[str, Any] = {}
    if file.is_file():
        recipe = json.loads(file.read_text(encoding="utf-8"))
        values = {name: value for name, value in recipe.items() if name in known}
        values.setdefault("task", DataSettings.task)
    else:
        longest = (tokenizer.model_max_length, max_positions(config) or _LONGEST, _LONGEST)
        values = {"task": _task_of(config, str(model.model_name_or_path)), "max_length": min(longest)}
        values["use_chat_template"] = bool(getattr(tokenizer, "chat_template", None))
    return DataSettings(**{**values, **given})


def _task_of(config: Any, path: str) -> str:
    """The task that a model was trained for, as far as its head tells."""
    if has_head(config, SEQUENCE_HEAD):
        return _OF_LABELS[problem_type(config)]
    if has_head(config, TOKEN_HEAD):
        return "token_classification"
    if has_head(config, "ForQuestionAnswering"):
        return "question_answering"
    if getattr(config, "is_encoder_decoder", False):
        return "summarization"
    name = (getattr(config, "apt_base_architecture", None) or (config.architectures or [""])[0]) or ""
    if name.endswith(("ForCausalLM", "LMHeadModel")):
        return "instruction_tuning"
    if name.endswith("Model") or (Path(path) / _OF_SENTENCE_TRANSFORMERS).is_file():
        return "embedding"
    raise UserError(
        f"{path} is a {name or 'model of an unknown class'}, which has not been trained to tell anything of a text. "
        "Give a fine-tuned model, or a model of embeddings."
    )


def _of_logits(logits: torch.Tensor, names: Sequence[str], task: str) -> Prediction:
    """What the logits [labels] of one text say."""
    if task == "regression":
        if len(logits) == 1:
            return {"value": float(logits[0])}
        return {"values": dict(zip(names, logits.tolist(), strict=True))}
    if task == "multi_label_classification":
        shares = logits.sigmoid()
        chosen = [name for name, logit in zip(names, logits.tolist(), strict=True) if logit > 0]
        return {"labels": chosen, "scores": _sorted(shares, names)}
    shares = logits.softmax(-1)
    return {**_likeliest(shares, names), "scores": _sorted(shares, names)}


def _likeliest(shares: torch.Tensor, names: Sequence[str]) -> Prediction:
    best = int(shares.argmax())
    return {"label": names[best], "score": float(shares[best])}


def _is_empty(value: Any) -> bool:
    """Whether a cell holds no text, no word and no message."""
    return not value if isinstance(value, list) else value is None or not str(value).strip()


def _sorted(shares: torch.Tensor, names: Sequence[str]) -> dict[str, float]:
    """Probability of each label, the largest first."""
    order = shares.argsort(descending=True, stable=True).tolist()
    return {names[number]: float(shares[number]) for number in order}


def _even(rows: Sequence[np.ndarray]) -> np.ndarray:
    """Rows of different lengths as one array, padded with what no maximum takes."""
    length = max(len(row) for row in rows)
    return np.stack([np.pad(row, (0, length - len(row)), constant_values=-np.inf) for row in rows])
