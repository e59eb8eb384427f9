"""Rows that a run has tokenized are those that the run it starts would tokenize, whatever the task."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from texts import word_tokenizer, words

from apt_trainer.settings import DataSettings
from apt_trainer.tasks import TASK_KINDS, TaskData, load_task
from apt_trainer.tasks.shared_rows import FOLDER, hand_over, keeping_rows


def _row(task: str, seed: int) -> dict[str, Any]:
    text, other = words(6, seed), words(4, seed + 100)
    if task == "token_classification":
        return {"tokens": text.split(), "tags": ["O", "B-X"] * 3}
    if task == "question_answering":
        answers = {"text": [text.split()[1]], "answer_start": [len(text.split()[0]) + 1]}
        return {"question": other, "context": text, "answers": answers}
    return {
        "classification": {"text": text, "label": seed % 2},
        "multi_label_classification": {"text": text, "label": [["a"], ["a", "b"]][seed % 2]},
        "regression": {"text": text, "label": float(seed)},
        "embedding": {"text": text, "pair": other, "score": seed / 40},
        "language_modeling": {"text": text},
        "masked_language_modeling": {"text": text},
        "instruction_tuning": {"prompt": text, "completion": other},
        "summarization": {"text": text, "summary": other},
        "translation": {"text": text, "target": other},
    }[task]


SETTINGS: dict[str, dict[str, Any]] = {
    "token_classification": {"text_column": "tokens", "label_column": "tags"},
    "question_answering": {"doc_stride": 2},
    "embedding": {"text_column": "text", "text_pair_column": "pair", "label_column": "score"},
    "summarization": {"text_column": "text", "target_column": "summary", "max_target_length": 6},
    "translation": {"text_column": "text", "target_column": "target", "max_target_length": 6},
}


def _load(file: Path, task: str, **changes: Any) -> TaskData:
    """The same file to train and to validate, whose rows are encoded otherwise in some tasks."""
    given = {"train_file": str(file), "validation_file": str(file), "max_length": 16, **SETTINGS.get(task, {})}
    tokenizer = word_tokenizer()
    tokenizer.add_special_tokens({"mask_token": "<mask>"})
    return load_task(DataSettings(task=task, **given | changes), tokenizer, 1)


@pytest.mark.parametrize("task", [task for task in TASK_KINDS if task != "image_classification"])
def test_rows_are_not_tokenized_again(task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(_row(task, seed)) + "\n" for seed in range(12)))
    alone = _load(file, task)
    with keeping_rows() as rows:
        kept = _load(file, task)
    assert rows and kept.train[:] == alone.train[:] and kept.validation[:] == alone.validation[:]
    for name, value in hand_over(rows, tmp_path / "rows").items():
        monkeypatch.setenv(name, value)
    tokenized: list[int] = []
    plain = Dataset.map

    def counted(self: Dataset, *args: Any, **kwargs: Any) -> Dataset:
        tokenized.append(len(self))
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(Dataset, "map", counted)
    handed = _load(file, task)
    assert tokenized == [] and handed.train[:] == alone.train[:] and handed.validation[:] == alone.validation[:]
    assert handed.train.features == alone.train.features
    changed = {"use_chat_template": False, "max_length": 9} if task == "instruction_tuning" else {"max_length": 9}
    if "language_modeling" not in task:  # whose blocks are cut after it
        _load(file, task, **changed)
        assert tokenized
    tokenized.clear()
    file.write_text("".join(json.dumps(_row(task, seed)) + "\n" for seed in range(1, 13)))
    other = _load(file, task)
    assert tokenized and other.train[:] != handed.train[:]
    monkeypatch.delenv(FOLDER)
    assert _load(file, task).train[:] == other.train[:]
