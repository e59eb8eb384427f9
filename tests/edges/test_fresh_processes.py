"""What a user copies works where a user pastes it: in a process that has imported nothing else yet."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import warm
from datasets import Dataset
from texts import word_tokenizer, words
from tiny import logits, parts, random_plan, tiny_batch, tiny_model
from transformers import PreTrainedModel

import apt_trainer
from apt_trainer import cli
from apt_trainer.cli.train import loading_code
from apt_trainer.settings import known_settings
from apt_trainer.settings.recipe import check_recipe, read_values
from apt_trainer.store.saved_model import as_pruned
from apt_trainer.surgery.cutting import apply_plan

ROOT = Path(apt_trainer.__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
RECIPES = (ROOT / "recipes" / "README.md").read_text(encoding="utf-8")


def run_python(code: str, folder: Path) -> str:
    """Standard output of ``code`` in a process of its own, which has to end well."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout


NOTHING_YET = """import sys
assert not {"apt_trainer", "peft", "transformers"} & set(sys.modules)
"""


def run_each(cases: list[str], folder: Path) -> None:
    """Run every piece of code in a process in which neither transformers nor apt_trainer is imported yet."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    for case in cases:
        command = [warm.python(warm.LIBRARIES), "-c", NOTHING_YET + case]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, f"{case}\n{done.stderr}"


def cut(task: str = "ForSequenceClassification") -> PreTrainedModel:
    model = tiny_model("bert", task)
    family, spaces, dense = parts(model)
    plan = random_plan(spaces, dense, seed=5, vanish=["layers.1.heads"])
    apply_plan(model, family, spaces, dense, plan)
    as_pruned(model, family, plan)
    model.resize_token_embeddings(len(word_tokenizer()))
    return model


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds out/small, a cut classifier with its tokenizer."""
    folder = tmp_path_factory.mktemp("small")
    cut().save_pretrained(folder / "out" / "small")
    word_tokenizer().save_pretrained(folder / "out" / "small")
    return folder


def save_dense(folder: Path, task: str) -> None:
    """A dense model, with a tokenizer that it can read."""
    tokenizer, model = word_tokenizer(), tiny_model("bert", task)
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def test_importing_the_package_imports_nothing_heavy(tmp_path: Path) -> None:
    """Nor does naming what needs no tensors; and transformers' configs do not wait for its modelling code."""
    code = """
        import sys
        import apt_trainer, apt_trainer.settings
        assert not {"torch", "transformers", "numpy", "peft"} & set(sys.modules)
        from transformers import AutoConfig
        assert "transformers.modeling_utils" not in sys.modules
        assert AutoConfig.for_model("apt_bert").model_type == "bert"
    """
    run_python(textwrap.dedent(code), tmp_path)


def test_a_result_loads_in_any_order_of_imports(small: Path) -> None:
    lines = {
        "AutoConfig": "AutoConfig.from_pretrained('out/small')",
        "AutoModel": "AutoModel.from_pretrained('out/small')",
        "pipeline": "pipeline('text-classification', model='out/small', device='cpu')('w1 w2')",
    }
    cases = ["from apt_trainer import load_pruned; load_pruned('out/small')"]
    for name, use in lines.items():
        cases.append(f"import apt_trainer; from transformers import {name}; {use}")
        cases.append(f"from transformers import {name}; import apt_trainer; {use}")
    cases[-1] = (
        "from transformers import AutoTokenizer; import apt_trainer; AutoTokenizer.from_pretrained('out/small')"
    )
    run_each(cases, small)


def test_a_stock_class_by_its_name_stops_instead_of_filling_weights_at_random(small: Path) -> None:
    """With and without apt_trainer; what is gone as a whole would be made anew, with no more than a warning. A save by
    the carried code says the same."""
    stops = """
    try:
        BertForSequenceClassification.from_pretrained({0!r})
    except OSError as error:
        assert "load_with_apt_trainer" in str(error)
    else:
        raise AssertionError("it loaded")
    """
    code = """
    from transformers import AutoModelForSequenceClassification, BertForSequenceClassification
    import sys
    sys.modules["apt_trainer"] = None
    model = AutoModelForSequenceClassification.from_pretrained("out/small", trust_remote_code=True)
    model.save_pretrained("out/again")
    """
    before, after = (textwrap.dedent(part) for part in (code, stops))
    first = "from transformers import BertForSequenceClassification\n"
    run_each(
        [
            first + after.format("out/small"),
            f"import apt_trainer\n{first}{after.format('out/small')}",
            before + after.format("out/again"),
        ],
        small,
    )


def test_pickles_of_a_result_are_read(small: Path) -> None:
    import pickle

    model = apt_trainer.load_pruned(small / "out" / "small")
    (small / "model.pkl").write_bytes(pickle.dumps((model, model.config)))
    run_each(["import pickle; pickle.load(open('model.pkl', 'rb'))[0].bert"], small)


# ---------------------------------------------------------------------------- README


def test_the_python_of_the_readme_runs_each_in_its_own_process(tmp_path: Path) -> None:
    training, loading = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    of_recipes = re.findall(r"```python\n(.*?)```", RECIPES, flags=re.DOTALL)
    # run by test_first_hour.py and test_session.py
    assert ["PruningSession" in snippet for snippet in of_recipes] == [False, True]
    save_dense(tmp_path / "model", "ForMaskedLM")
    texts, labels = [words(3, seed=i) for i in range(64)], [i % 2 for i in range(64)]
    in_a_sentence = re.search(r"`(AutoModel\w+\.from_pretrained\(\"out/small\"\))`", README)
    assert in_a_sentence is not None
    auto = in_a_sentence[1].partition(".")[0]
    sentence = f"import apt_trainer\nfrom transformers import {auto}\n{in_a_sentence[1]}"
    run_each([f"MODEL, TEXTS, LABELS = 'model', {texts!r}, {labels!r}\n{training}", loading, sentence], tmp_path)


def commands(text: str) -> list[list[str]]:
    """The commands of a README, continued lines joined, comments left out."""
    joined = text.replace("\\\n", " ")
    lines = re.findall(r"^(?:    )?((?:apt-trainer|python scripts/|bash scripts/).*)$", joined, flags=re.MULTILINE)
    return [shlex.split(line, comments=True) for line in lines]


@pytest.mark.parametrize("words", commands(README) + commands(RECIPES), ids=" ".join)
def test_the_commands_of_the_readmes_are_ones(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Their files are there, their options are known, their settings have values that can be."""
    monkeypatch.chdir(ROOT)
    files = [word for word in words if re.match(r"(recipes|scripts)/\S+\.(yaml|py|sh)", word)]
    assert all(Path(file).is_file() for file in files)
    if words[0] != "apt-trainer":
        source = Path(files[0]).read_text(encoding="utf-8")
        own = {word for word in words if word.startswith("--") and f'"{word}"' in source}
        rest = {word.removeprefix("--") for word in words if word.startswith("--")} - {word[2:] for word in own}
        assert rest <= (set(known_settings()) if "parse_known_args" in source else set())
        return
    verbs = {name: __import__(path, fromlist=["run"]) for name, path in cli.VERBS.items()}
    args, overrides = cli._parser(verbs).parse_known_args(words[1:])
    assert not overrides or verbs[args.verb].TAKES_SETTINGS
    if args.verb == "train":
        check_recipe(args.config, overrides)
    elif args.verb != "ablate":
        read_values(None, overrides)


# ---------------------------------------------------------------------------- what a run prints


def test_what_a_run_prints_loads_its_result(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Pruned and not; with the head, and the logits that it ended with."""
    save_dense(tmp_path / "model", "ForMaskedLM")
    rows = {"text": [words(4, seed=i) for i in range(60)], "label": [f"l{i % 3}" for i in range(60)]}
    Dataset.from_dict(rows).to_json(tmp_path / "train.jsonl")
    cases = []
    for sparsity in ("0.4", "null"):
        output = tmp_path / f"out-{sparsity}"
        given = {"model_name_or_path": tmp_path / "model", "train_file": tmp_path / "train.jsonl", "max_length": 8}
        given |= {"output_dir": output, "target_sparsity": sparsity, "max_steps": 8, "num_pruning_events": 1}
        given |= {"use_cpu": "true", "report_to": "none", "measure_latency": "false", "max_rank": 2, "lora_r": 2}
        assert cli.main(["train", *(word for key, value in given.items() for word in (f"--{key}", str(value)))]) == 0
        code = textwrap.dedent(capsys.readouterr().out.split("Load the result:")[1])
        assert code.strip() == textwrap.dedent("    " + loading_code(str(output))).strip()
        cases.append(f"{code}\nassert type(model).__name__ == 'BertForSequenceClassification', type(model)")
        cases[-1] += "\nassert model.config.label2id == {'l0': 0, 'l1': 1, 'l2': 2}"
    run_each(cases, tmp_path)


def test_the_printed_code_names_the_class_that_was_saved(tmp_path: Path) -> None:
    for task in ("ForSequenceClassification", "ForTokenClassification", "ForMaskedLM"):
        stock = tiny_model("bert", task)
        stock.save_pretrained(tmp_path / task)
        space: dict[str, PreTrainedModel] = {}
        exec(textwrap.dedent("    " + loading_code(str(tmp_path / task))), space)
        batch = tiny_batch(stock)
        assert type(space["model"]) is type(stock)
        assert bool((logits(space["model"].eval(), batch) == logits(stock, batch)).all())
    cut().save_pretrained(tmp_path / "small")
    assert loading_code(str(tmp_path / "small")).startswith("from apt_trainer import load_pruned")
