"""What a finished model, pruned or not, says of texts: labels, numbers, tags, answers, embeddings, continuations; and
of images: labels.

Texts are encoded as the tasks encode them, with the settings of the run where the folder has its recipe. Not for
scores on labelled data (``runs.run``), nor for conversations (``generation``).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from datasets import Dataset, Image

from apt_trainer.evaluate.generation import Generator
from apt_trainer.evaluate.given_rows import IMAGES, OF_LABELS, given_rows
from apt_trainer.libraries import versions
from apt_trainer.models.labels import names_of
from apt_trainer.models.pooling import mean_pooling
from apt_trainer.settings import ModelSettings
from apt_trainer.settings.packages import SENTENCE_TRANSFORMERS, check_packages, require
from apt_trainer.store.pretrained import (
    cache_of,
    choose_device,
    compares_texts,
    load_processor,
    load_saved,
    read_config,
    source_of,
)
from apt_trainer.tasks.base import check_name, right_padding
from apt_trainer.tasks.classification import encode_texts
from apt_trainer.tasks.empty_texts import is_empty
from apt_trainer.tasks.images import PIXELS, open_image, pixels_of
from apt_trainer.tasks.instruction_tuning import prompt_encoder
from apt_trainer.tasks.nested import with_fields
from apt_trainer.tasks.question_answering import SPAN_COLUMNS, best_answers, features_of
from apt_trainer.tasks.tokens import encode_words, word_prefix

logger = logging.getLogger(__name__)

Prediction = dict[str, Any]
_NO_TAG: Prediction = {"label": None, "score": None}


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
        self.tokenizer = load_processor(model, self.config)
        self.given = given_rows(model, self.config, self.tokenizer, given)
        self.data = self.given.data
        self.device = choose_device(options.device)

    def predict(self, rows: Dataset) -> Iterator[Prediction]:
        """One prediction a row, in their order: ``row``, the texts that were read by their columns, what was found.

        A row without text, or too long to be gone on from, has an ``error`` in place of what was found.
        """
        if self.data.task == IMAGES:
            yield from self._images(rows)
            return
        columns, optional = self.given.columns(rows)
        named = [*columns, *(name for name in optional if name in rows.column_names)]
        rows = with_fields(rows, named)
        for name in columns:
            check_name(rows, name, f"The data to predict have no column {name!r}.")
        cells = [rows[name][:] for name in columns]
        filled = [row for row, values in enumerate(zip(*cells, strict=True)) if not any(map(is_empty, values))]
        if len(filled) < len(rows):
            logger.warning("%d of %d rows have no text and are not predicted.", len(rows) - len(filled), len(rows))
        found = self._found(rows.select(filled)) if filled else iter(())
        have_text = set(filled)
        for number in range(len(rows)):
            texts = {name: rows[number][name] for name in named}
            yield {"row": number, **texts, **(next(found) if number in have_text else {"error": "no text"})}

    def _found(self, rows: Dataset) -> Iterator[Prediction]:
        task = self.data.task
        if task in OF_LABELS.values():
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

    def _classes(self, rows: Dataset) -> Iterator[Prediction]:
        model, names, columns = self._loaded(), names_of(self.config), self.given.text_columns(rows)
        for batch in self._batches(rows):
            encoded = encode_texts(batch, self.tokenizer, columns, self.data.max_length)
            logits = self._outputs(model, encoded).logits.float().cpu()
            yield from (_of_logits(row, names, self.data.task) for row in logits)

    def _images(self, rows: Dataset) -> Iterator[Prediction]:
        model, names, column = self._loaded(), names_of(self.config), self.given.image_column(rows)
        cells = rows.cast_column(column, Image(decode=False))[column][:]
        size = self.options.batch_size
        for start in range(0, len(cells), size):
            images = [open_image(cell, start + i) for i, cell in enumerate(cells[start : start + size])]
            with torch.inference_mode():
                pixels = pixels_of(images, self.tokenizer)[PIXELS].to(self.device, model.dtype)
                logits = model(**{PIXELS: pixels}).logits.float().cpu()
            for row, of_image in enumerate(logits, start):
                yield {"row": row, column: cells[row]["path"], **_of_logits(of_image, names, self.data.task)}

    def _tags(self, rows: Dataset) -> Iterator[Prediction]:
        """Each word of a row with its tag; null where the model does not read the word."""
        model, names, column = self._loaded(), names_of(self.config), self.given.text_columns(rows).text
        prefix, unread = word_prefix(self.tokenizer), 0
        for batch in self._batches(rows):
            encoded, begun = encode_words(batch[column], self.tokenizer, prefix, self.data.max_length)
            shares = self._outputs(model, encoded).logits.float().softmax(-1).cpu()
            for words, of_row, numbers in zip(batch[column], shares, begun, strict=True):
                read = {w: _likeliest(of_row[place], names) for place, w in enumerate(numbers) if w is not None}
                unread += len(words) - len(read)
                yield {"tags": [{"word": word, **read.get(w, _NO_TAG)} for w, word in enumerate(words)]}
        if unread:
            told = "%d words have no tag (null): they lie beyond max_length=%d, or no token is made of them."
            logger.warning(told, unread, self.data.max_length)

    def _answers(self, rows: Dataset) -> list[Prediction]:
        model, columns = self._loaded(), self.given.text_columns(rows)
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
        embed, columns = self._embedder(), self.given.text_columns(rows)
        for batch in self._batches(rows):
            first = embed(batch[columns.text])
            if columns.text_pair is None:
                yield from ({"embedding": vector.tolist()} for vector in first)
                continue
            second = embed(batch[columns.text_pair])
            cosines = torch.nn.functional.cosine_similarity(first, second, dim=-1)
            yield from ({"similarity": cosine} for cosine in cosines.tolist())

    def _embedder(self) -> Any:
        """From texts to embeddings [texts, d]: as sentence-transformers says where the model is one of its, else the
        mean of hidden states."""
        if compares_texts(self.model_settings):
            path, place = source_of(self.model_settings).path, cache_of(self.model_settings)
            require(SENTENCE_TRANSFORMERS, f"{path} is a model of sentence-transformers and")
            versions.check_versions(versions.SENTENCE_TRANSFORMERS)
            from sentence_transformers import SentenceTransformer

            model = SentenceTransformer(
                path, device=str(self.device), revision=place["revision"], cache_folder=place["cache_dir"]
            )
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
            encode: Callable[[dict[str, Any]], list[int]] = partial(
                self._source, column=self.given.text_columns(rows).text
            )
        else:
            encode = prompt_encoder(self.given.prompt_columns(rows.column_names), self.data, self.tokenizer)
        for batch in self._batches(rows):
            cells = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
            prompts = [encode(row) for row in cells]
            refused = [generator.no_room(ids) for ids in prompts]
            texts = iter(generator.write([ids for ids, why in zip(prompts, refused, strict=True) if why is None]))
            yield from ({"generated": next(texts)} if why is None else {"error": why} for why in refused)

    def _source(self, row: dict[str, Any], column: str) -> list[int]:
        text = self.data.source_prefix + row[column]
        return list(self.tokenizer(text, truncation=True, max_length=self.data.max_length).input_ids)


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


def _sorted(shares: torch.Tensor, names: Sequence[str]) -> dict[str, float]:
    """Probability of each label, the largest first."""
    order = shares.argsort(descending=True, stable=True).tolist()
    return {names[number]: float(shares[number]) for number in order}


def _even(rows: Sequence[np.ndarray]) -> np.ndarray:
    """Rows of different lengths as one array, padded with what no maximum takes."""
    length = max(len(row) for row in rows)
    return np.stack([np.pad(row, (0, length - len(row)), constant_values=-np.inf) for row in rows])
