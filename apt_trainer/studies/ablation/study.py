"""A study file: a verb, a base file, variants of it (changed keys) and seeds, checked as a whole. Starts nothing."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apt_trainer.errors import UserError, unknown_choice
from apt_trainer.settings.recipe import read_file
from apt_trainer.settings.shipped import find_file, study_names
from apt_trainer.studies.ablation.commands import Command, TrainCommand, told_of_base

TRAIN = TrainCommand()
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
    "command": _TEXT,
}
_OPTIONAL = ("command", "common", "baseline", "metrics")


@dataclass(frozen=True, eq=False)
class Run:
    """One run: ``words`` go to the verb ``command``, ``given`` is what its ``recipe.json`` will hold."""

    variant: str
    seed: int
    folder: Path
    command: Command
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
    path: str,
    output_dir: str | None = None,
    seeds: Sequence[int] | None = None,
    overrides: Sequence[str] = (),
    commands: Sequence[Command] = (TRAIN,),
) -> Study:
    """Read a study file.

    Args:
        path: The YAML file.
        output_dir: Instead of the file's.
        seeds: Instead of the file's.
        overrides: Keys as ``--key value``, which override those of every variant.
        commands: Verbs that a study can name as ``command``, the default first.

    Raises:
        UserError: for an unreadable file, an unknown or missing key, a wrong type, a base file that is missing, a
            variant that cannot work or equals another, or an unknown command or baseline.
    """
    path = str(find_file(path))
    if not Path(path).is_file():
        names = ", ".join(study_names())
        raise UserError(
            f"{path}: no such file. Give a study with --study, or one that comes with apt_trainer: {names}."
        )
    content = read_file(path) | ({"output_dir": output_dir} if output_dir else {})
    content |= {"seeds": list(seeds)} if seeds is not None else {}
    for key in content:
        if key not in _FORMS:
            raise unknown_choice(f"{path}: key", key, _FORMS)
    for key, (form, fits) in _FORMS.items():
        if not (key in _OPTIONAL and content.get(key) is None) and not fits(content.get(key)):
            raise UserError(f"{path}: {key}={content.get(key)!r} must be {form}.")
    known = {command.name: command for command in commands}
    name = content.get("command") or commands[0].name
    if name not in known:
        raise unknown_choice(f"{path}: command", name, known)
    base, baseline = Path(path).parent / content["base"], content.get("baseline")
    if not base.is_file():
        raise UserError(f"{path}: base={content['base']!r} does not exist. Looked for {base}, beside the study.")
    common, last = content.get("common") or {}, known[name].overrides(overrides)
    variants = {name: common | (changed or {}) | last for name, changed in content["variants"].items()}
    if baseline is not None and baseline not in variants:
        raise unknown_choice(f"{path}: baseline", baseline, variants)
    runs = _runs(path, known[name], base, Path(content["output_dir"]), content["seeds"], variants)
    return Study(path, Path(content["output_dir"]), runs, baseline, content.get("metrics"))


def _runs(
    path: str, command: Command, base: Path, folder: Path, seeds: Sequence[int], variants: Mapping[str, dict[str, Any]]
) -> list[Run]:
    checked = {name: _checked(path, command, base, name, changes) for name, changes in variants.items()}
    _check_distinct(path, {name: command.comparable(given) for name, given in checked.items()})
    of_folder, of_seed, *_ = command.set_by_study
    runs = []
    for seed in seeds:
        for name, given in checked.items():
            place = folder / name / f"seed-{seed}"
            words = command.words(base, variants[name], place, seed)
            digest = hashlib.sha256(json.dumps(given, sort_keys=True).encode()).hexdigest()
            recipe = given | {of_seed: seed, of_folder: str(place)}
            runs.append(Run(name, seed, place, command, words, recipe, digest))
    return runs


def _is_name(name: Any) -> bool:
    return isinstance(name, str) and re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name) is not None


def _checked(path: str, command: Command, base: Path, name: str, changes: Mapping[str, Any]) -> dict[str, Any]:
    """The checked keys of one variant."""
    for key in command.set_by_study:
        if key in changes:
            raise UserError(f"{path}: variant {name!r} sets {key}, which the study sets for each run. Remove it.")
    try:
        return command.check(base, changes)
    except UserError as error:
        raise UserError(f"{path}: variant {name!r}: {told_of_base(error)}") from error


def _check_distinct(path: str, variants: Mapping[str, Mapping[str, Any]]) -> None:
    names = list(variants)
    for i, name in enumerate(names):
        for other in names[:i]:
            if variants[name] == variants[other]:
                raise UserError(f"{path}: variant {name!r} equals {other!r} in all settings. Remove one of them.")
