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
PAGES = [ROOT / "README.md", *sorted((ROOT / "recipes").glob("*.md")), ROOT / "apt_trainer" / "README.md"]
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


def test_the_verbs_and_keys_that_pages_name_exist() -> None:
    assert set(re.findall(r"`apt-trainer (\w+)", README)) == set(VERBS)
    settings = (ROOT / "recipes" / "settings.md").read_text(encoding="utf-8")
    rows = [row.split("|")[1] for row in settings.splitlines() if row.startswith("| `")]
    keys = {key for names in rows for key in re.findall(r"`(\w+)`", names)}
    assert len(keys) > 20 and keys <= set(known_settings())
    commands = (ROOT / "recipes" / "commands.md").read_text(encoding="utf-8")
    assert set(re.findall(r"`apt-trainer (\w+)", commands)) == set(VERBS)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_files_that_a_page_names_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    links = [link.partition("#") for link in re.findall(r"\]\(([^)]+)\)", text) if "://" not in link]
    named = [ROOT / name for name in re.findall(r"(?<![\w/])(?:scripts|recipes)/[\w/.-]+\.\w+", text)]
    named += [page.parent / path if path else page for path, _, _ in links]
    assert [path for path in named if not path.exists()] == []
    assert named or page.name != "README.md"
    for path, _, section in links:
        if section:
            headings = re.findall(r"^#+ (.+)$", (page.parent / path).read_text(encoding="utf-8"), flags=re.MULTILINE)
            assert section in {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
