"""The JSON schemas of recipes and studies: those that come with the package are true, and say no to what is wrong."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from referencing import Registry, Resource

from apt_trainer import cli
from apt_trainer.cli.schema import KINDS, schemas
from apt_trainer.settings import known_settings
from apt_trainer.settings.recipe import read_file
from apt_trainer.settings.shipped import RECIPES, SCHEMAS

ROOT = Path(__file__).parents[3]
FIRST = "# yaml-language-server: $schema="
OWN = [file for file in sorted(RECIPES.rglob("*.yaml")) if file.parent.name not in ("accelerate", "lm_eval")]


def checks(name: str, content: Any) -> list[str]:
    """What the shipped schema has against ``content``."""
    shipped = {kind: json.loads((SCHEMAS / f"{kind}.json").read_text(encoding="utf-8")) for kind in KINDS}
    known = Registry().with_resources(
        (f"{kind}.json", Resource.from_contents(schema)) for kind, schema in shipped.items()
    )
    validator = jsonschema.Draft7Validator(shipped[name], registry=known)
    return [f"{'.'.join(map(str, error.absolute_path))}: {error.message}" for error in validator.iter_errors(content)]


@pytest.mark.parametrize("file", OWN, ids=lambda file: file.relative_to(RECIPES).as_posix())
def test_every_shipped_file_names_its_schema_and_keeps_to_it(file: Path) -> None:
    line = file.read_text(encoding="utf-8").splitlines()[0]
    assert line.startswith(FIRST), f"the first line of {file} should be {FIRST}../schema/recipe.json (or study.json)"
    named = (file.parent / line.removeprefix(FIRST)).resolve()
    assert named.parent == SCHEMAS.resolve() and named.stem in KINDS
    assert checks(named.stem, read_file(str(file))) == []


def test_shipped_schemas_are_those_that_are_made() -> None:
    """To mend it: apt-trainer schema --output recipes/schema. Keys of other versions of transformers may differ."""
    pinned = f"transformers=={version('transformers')}" in (ROOT / "scripts/constraints.txt").read_text().splitlines()
    for name, schema in schemas().items():
        jsonschema.Draft7Validator.check_schema(schema)
        shipped = json.loads((SCHEMAS / f"{name}.json").read_text(encoding="utf-8"))
        if name == "recipe" and not pinned:
            kept = known_settings()
            shipped, schema = ({key: of["properties"][key] for key in kept} for of in (shipped, schema))
        assert shipped == schema, f"recipes/schema/{name}.json is old"


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ({"target_sparsity": "0.6"}, "target_sparsity: '0.6' is not of type"),
        ({"task": "clasification"}, "task: 'clasification' is not one of"),
        ({"prune_targets": ["head"]}, "prune_targets.0: 'head' is not one of"),
        ({"eval_strategy": "sometimes"}, "eval_strategy: 'sometimes' is not one of"),
        ({"lerning_rate": 1e-4}, "'lerning_rate' was unexpected"),
        ({"max_steps": 1.5}, "max_steps: 1.5 is not of type 'integer'"),
        ({"tune_after_pruning": None, "resume_from_checkpoint": True, "report_to": "none", "deepspeed": {}}, None),
        ({"class_weights": "balanced", "vocabulary": 100, "outlier_weight": 0.2, "optim": "adamw_torch"}, None),
    ],
)
def test_a_recipe(content: dict[str, Any], told: str | None) -> None:
    found = checks("recipe", content)
    assert not found if told is None else any(told in each for each in found)


@pytest.mark.parametrize(
    ("changes", "right"),
    [
        ({}, True),
        ({"seeds": [1, 1]}, False),
        ({"variants": {"a b": {}}}, False),
        ({"variants": {"a": {"target_sparsty": 0.1}}}, False),
        ({"variants": {"a": {"kind": "attention"}}}, False),
        ({"command": "drop", "variants": {"a": {"kind": "attention", "count": 2}}}, True),
        ({"command": "drop", "variants": {"a": {"kind": "atention"}}}, False),
        ({"command": "dropp"}, False),
        ({"variant": {}}, False),
    ],
)
def test_a_study(changes: dict[str, Any], right: bool) -> None:
    study = {
        "base": "r.yaml",
        "output_dir": "out",
        "seeds": [1],
        "variants": {"a": {"target_sparsity": 0.1}, "b": None},
    }
    assert (checks("study", study | changes) == []) == right


def test_help_and_defaults_are_those_of_the_command_line() -> None:
    properties = schemas()["recipe"]["properties"]
    for name, told in known_settings().items():
        assert properties[name]["description"] == told
    assert properties["target_sparsity"]["default"] == 0.6 and properties["prune_targets"]["default"][0] == "heads"
    assert properties["outlier_weight"]["deprecated"]


def test_the_verb_prints_one_and_writes_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["schema", "study"]) == 0
    assert json.loads(capsys.readouterr().out)["title"] == "A study of apt_trainer"
    assert cli.main(["schema", "--output", str(tmp_path)]) == 0
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(f"{kind}.json" for kind in KINDS)


def test_completion_knows_verbs_and_keys(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--print-completion", "bash"])
    said = capsys.readouterr().out
    assert "--target_sparsity" in said and "--learning_rate" in said and "predict" in said
    monkeypatch.setattr("apt_trainer.settings.packages.Package.is_installed", False)
    assert cli.main(["--print-completion", "bash"]) == 2
    assert "pip install 'apt-trainer[completion]'" in capsys.readouterr().err
