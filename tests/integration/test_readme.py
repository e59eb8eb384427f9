"""What the README says is run: its Python examples, its commands and its links."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from tiny import gap, tiny_config
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForSequenceClassification,
    BertForSequenceClassification,
    PreTrainedTokenizerFast,
)

from apt_trainer.cli import VERBS
from apt_trainer.settings import known_settings

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
WORDS = ["good", "bad", "film", "plot", "actor"]


def _examples() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


@pytest.fixture
def names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """MODEL, TEXTS and LABELS of the README, small."""
    monkeypatch.chdir(tmp_path)
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="[PAD]", unk_token="[UNK]")
    BertForSequenceClassification(tiny_config("bert", num_labels=2)).save_pretrained("model")
    tokenizer.save_pretrained("model")
    labels = [i % 2 for i in range(64)]
    texts = [f"{WORDS[1 - label]} film" for label in labels]
    return {"MODEL": "model", "TEXTS": texts, "LABELS": labels}


def test_the_examples_run(names: dict[str, object]) -> None:
    training, loading = _examples()
    space = dict(names)
    exec(compile(training, "README.md", "exec"), space)
    small, trained = space["small"].eval(), space["trainer"].model.eval()
    ids = torch.tensor([[2, 4, 6, 3]])
    assert gap(small(input_ids=ids).logits, trained(input_ids=ids).logits) <= 1e-7
    again: dict[str, object] = {}
    exec(compile(loading, "README.md", "exec"), again)
    auto = AutoModelForSequenceClassification.from_pretrained("out/small").eval()
    for model in (again["model"].eval(), auto):
        assert gap(model(input_ids=ids).logits, small(input_ids=ids).logits) <= 1e-7


def test_the_verbs_and_keys_it_names_exist() -> None:
    assert set(re.findall(r"`apt-trainer (\w+)", README)) == set(VERBS)
    table = README.split("The keys that matter most")[1].split("##")[0]
    keys = {
        key for row in table.splitlines() if row.startswith("| `") for key in re.findall(r"`(\w+)`", row.split("|")[1])
    }
    assert keys and keys <= set(known_settings())


def test_the_files_it_names_exist() -> None:
    named = re.findall(r"(?:scripts|recipes)/[\w/.-]+\.\w+", README)
    assert named
    assert [path for path in named if not (ROOT / path).is_file()] == []
