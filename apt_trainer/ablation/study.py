"""A study file: a base recipe, variants of it (changed keys) and seeds, checked as a whole. Starts nothing."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

from apt_trainer.config import APTConfig
from apt_trainer.errors import UserError, unknown_choice
from apt_trainer.recipe import COMMAND_LINE, _read_file, check_recipe, read_values
from apt_trainer.settings import DataSettings, ModelSettings

SET_BY_STUDY = ("seed", "output_dir", "resume_from_checkpoint")
_TEXT = "text", lambda v: isinstance(v, str)
_FORMS: dict[str, tuple[str, Any]] = {
    "base": _TEXT,
    "output_dir": _TEXT,
    "seeds": (
        "a list of different whole numbers",
        lambda v: isinstance(v, list) and v and all(type(s) is int for s in v) and len(set(v)) == len(v),
    ),
    "variants": (
        "a mapping of names (letters, digits, '_', '-' and '.') to mappings of keys",
        lambda v: isinstance(v, dict) and v and all(_is_name(n) and isinstance(o, dict | None) for n, o in v.items()),
    ),
    "common": ("a mapping of keys that all variants start from", lambda v: isinstance(v, dict)),
    "baseline": _TEXT,
    "metrics": (
        "a list of keys of metrics.json, such as latency_ms.pruned.1.median_ms",
        lambda v: isinstance(v, list) and v and all(isinstance(key, str) for key in v),
    ),
}
_OPTIONAL = ("common", "baseline", "metrics")


@dataclass(frozen=True, eq=False)
class Run:
    """One training run: ``words`` go to ``apt-trainer train``, ``given`` is what its ``recipe.json`` will hold."""

    variant: str
    seed: int
    folder: Path
    words: list[str]
    given: dict[str, Any]
    digest: str  # of ``given`` without what differs from seed to seed


@dataclass(frozen=True)
class Study:
    """``runs``: seed by seed, in the order of the variants; ``metrics``: dotted keys of ``metrics.json``."""

    path: str
    output_dir: Path
    runs: list[Run]
    baseline: str | None
    metrics: list[str] | None


def read_study(
    path: str, output_dir: str | None = None, seeds: Sequence[int] | None = None, overrides: Sequence[str] = ()
) -> Study:
    """Read a study file.

    Args:
        path: The YAML file.
        output_dir: Instead of the file's.
        seeds: Instead of the file's.
        overrides: Keys of a recipe as ``--key value``, which override the file's in every variant.

    Raises:
        UserError: for an unreadable file, an unknown or missing key, a wrong type, a base recipe that is missing, a
            variant that cannot work or equals another, or an unknown baseline.
    """
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file. Give a study with --study.")
    content = _read_file(path) | ({"output_dir": output_dir} if output_dir else {})
    content |= {"seeds": list(seeds)} if seeds is not None else {}
    for key in content:
        if key not in _FORMS:
            raise unknown_choice(f"{path}: key", key, _FORMS)
    for key, (form, fits) in _FORMS.items():
        if not (key in _OPTIONAL and content.get(key) is None) and not fits(content.get(key)):
            raise UserError(f"{path}: {key}={content.get(key)!r} must be {form}.")
    base, baseline = Path(path).parent / content["base"], content.get("baseline")
    if not base.is_file():
        raise UserError(f"{path}: base={content['base']!r} does not exist. Looked for {base}, beside the study.")
    common, last = content.get("common") or {}, read_values(None, overrides)
    variants = {name: common | (changed or {}) | last for name, changed in content["variants"].items()}
    if baseline is not None and baseline not in variants:
        raise unknown_choice(f"{path}: baseline", baseline, variants)
    recipes = {name: _recipe(path, base, name, overrides) for name, overrides in variants.items()}
    _check_distinct(path, recipes)
    folder, runs = Path(content["output_dir"]), []
    for seed in content["seeds"]:
        for name, recipe in recipes.items():
            place = {"seed": seed, "output_dir": str(folder / name / f"seed-{seed}")}
            words = ["--config", str(base), *_words(variants[name] | place)]
            digest = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()
            runs.append(Run(name, seed, Path(place["output_dir"]), words, recipe | place, digest))
    return Study(path, folder, runs, baseline, content.get("metrics"))


def _is_name(name: Any) -> bool:
    return isinstance(name, str) and re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name) is not None


def _recipe(path: str, base: Path, name: str, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The checked keys of one variant."""
    for key in SET_BY_STUDY:
        if key in overrides:
            raise UserError(f"{path}: variant {name!r} sets {key}, which the study sets for each run. Remove it.")
    try:
        given = check_recipe(str(base), _words({**overrides, "output_dir": "out"}))
    except UserError as error:
        raise UserError(f"{path}: variant {name!r}: {str(error).removeprefix(f'{COMMAND_LINE}: ')}") from error
    return {key: value for key, value in given.items() if key not in SET_BY_STUDY}


def _check_distinct(path: str, recipes: Mapping[str, Mapping[str, Any]]) -> None:
    settings = [f for cls in (ModelSettings, DataSettings, APTConfig) for f in fields(cls)]
    defaults = {f.name: f.default if f.default_factory is MISSING else f.default_factory() for f in settings}
    names = list(recipes)
    for i, name in enumerate(names):
        for other in names[:i]:
            if defaults | dict(recipes[name]) == defaults | dict(recipes[other]):
                raise UserError(f"{path}: variant {name!r} equals {other!r} in all settings. Remove one of them.")


def _words(values: Mapping[str, Any]) -> list[str]:
    """Overrides for the command line; what JSON writes is read back as the same value, texts being in quotes."""
    return [f"--{key}={json.dumps(value, ensure_ascii=False)}" for key, value in values.items()]
