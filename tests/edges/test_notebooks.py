"""The notebooks run from top to bottom, in a kernel each, on tiny models and data in place of the real ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nbformat
import pytest
import warm
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from texts import WORDS, tiny_llama, word_tokenizer, words
from tiny import tiny_model

import apt_trainer

RECIPES = Path(apt_trainer.__file__).parents[1] / "recipes"
NAMES = ("quickstart", "llm")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose kernels import the package that is tested."""
    monkeypatch.setenv("PYTHONPATH", str(RECIPES.parent), prepend=":")
    return tmp_path


def executed(name: str, folder: Path, parameters: dict[str, Any], more: str) -> Any:
    """The notebook after it has run in ``folder`` with other ``parameters``; ``more``: code of a last cell."""
    notebook: Any = nbformat.read(RECIPES / f"{name}.ipynb", as_version=4)
    given = next(cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
    lines = [line.partition(" = ")[0] for line in given.source.splitlines() if " = " in line]
    assert sorted(", ".join(lines).split(", ")) == sorted(parameters)
    given.source = "\n".join(f"{key} = {value!r}" for key, value in parameters.items())
    notebook.cells.append(nbformat.v4.new_code_cell(more))
    kernel: Any = AsyncKernelManager()
    kernel.kernel_spec.argv[0] = warm.python(warm.LIBRARIES)
    NotebookClient(notebook, km=kernel, timeout=240, resources={"metadata": {"path": str(folder)}}).execute()
    return notebook


def shown(notebook: Any, kind: str) -> list[str]:
    """What cells have shown of a kind, and what they have printed."""
    return [
        output["text"] if "text" in output else output["data"][kind]
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if "text" in output or kind in output.get("data", {})
    ]


@pytest.mark.parametrize("name", NAMES)
def test_notebooks_are_kept_without_what_they_show(name: str) -> None:
    notebook = json.loads((RECIPES / f"{name}.ipynb").read_text(encoding="utf-8"))
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None
    nbformat.validate(notebook)


def test_the_quickstart_notebook_shows_what_is_left_and_predicts(here: Path) -> None:
    tokenizer, model = word_tokenizer(), tiny_model("bert").base_model
    model.resize_token_embeddings(len(tokenizer))
    for saved in (tokenizer, model):
        saved.save_pretrained(here / "model")
    for number in range(60):
        file = here / "texts" / ["sport", "trade"][number % 2] / f"{number}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(words(8, number))
    given = {"MODEL": "model", "FOLDER": "texts", "LENGTH": 8, "STEPS": 12, "SENTENCE": " ".join(WORDS[:4])}
    notebook = executed("quickstart", here, given, "print(classify(SENTENCE)[0]['label'])")
    printed = shown(notebook, "text/plain")
    assert any("accuracy 0." in text and "% of the parameters" in text for text in printed)
    assert printed[-1].strip() in ("sport", "trade")
    pictures = shown(notebook, "image/png")
    assert len([picture for picture in pictures if picture.startswith("iVBOR")]) == 1  # it is updated in its place
    assert max(map(len, pictures)) < 100_000
    assert any("Training Loss" in text for text in shown(notebook, "text/html"))
    assert apt_trainer.load_pruned(here / "out/notebook/small").num_labels == 2


def test_the_notebook_of_a_language_model_generates(here: Path) -> None:
    tokenizer = word_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    tokenizer.save_pretrained(here / "model")
    tiny_llama().save_pretrained(here / "model")
    with (here / "rows.jsonl").open("w") as file:
        for n in range(40):
            said = (("user", words(4, n)), ("assistant", words(5, n + 50)))
            file.write(json.dumps({"messages": [{"role": role, "content": text} for role, text in said]}) + "\n")
    data = {"path": "json", "data_files": "rows.jsonl", "split": "train"}
    given = {"MODEL": "model", "GGUF_FILE": None, "DATA": data, "LENGTH": 16, "STEPS": 6, "QUESTION": "w1 w2"}
    notebook = executed("llm", here, given, "print(small.num_parameters() < dense, answer.shape[1] > 2)")
    printed = shown(notebook, "text/plain")
    assert printed[-1] == "True True\n" and any("% of the parameters" in text for text in printed)
