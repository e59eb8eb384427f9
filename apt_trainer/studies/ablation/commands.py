"""The verbs that a study can run: how a base file and changed keys become a checked command line.

A training run takes a recipe. Other verbs (``drop``, ``paint``) take options of the command line, and their base file
holds those: ``kind: attention`` for ``--kind attention``, a list for several words, true for a flag, null for none.
Not for starting anything (``runner``).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, NoReturn, Protocol

from transformers.trainer_utils import get_last_checkpoint

from apt_trainer.errors import UserError
from apt_trainer.settings import DataSettings, ModelSettings
from apt_trainer.settings.config import APTConfig
from apt_trainer.settings.recipe import COMMAND_LINE, check_recipe, read_file, read_values, split_overrides

Values = Mapping[str, Any]


class Command(Protocol):
    """A verb of ``apt-trainer``."""

    @property
    def name(self) -> str:
        """As on the command line."""

    @property
    def set_by_study(self) -> tuple[str, ...]:
        """Keys that no variant may set: that of the folder, that of the seed, others."""

    @property
    def writes_recipe(self) -> bool:
        """Whether a run writes its own ``recipe.json``."""

    def overrides(self, words: Sequence[str]) -> dict[str, Any]:
        """Keys and values of ``--key value``; raises :class:`UserError` for what cannot be read."""

    def check(self, base: Path, changes: Values) -> dict[str, Any]:
        """What ``recipe.json`` will hold without what the study sets; raises :class:`UserError`."""

    def comparable(self, given: Values) -> dict[str, Any]:
        """``given`` in a form in which equal runs are equal."""

    def words(self, base: Path, changes: Values, folder: Path, seed: int) -> list[str]:
        """The command line after the verb."""

    def resume(self, folder: Path) -> list[str] | None:
        """Further words with which a run in ``folder`` goes on; None where it has to start anew."""


class TrainCommand:
    """``apt-trainer train``: the base file is a recipe."""

    name = "train"
    set_by_study = ("output_dir", "seed", "resume_from_checkpoint")
    writes_recipe = True

    def overrides(self, words: Sequence[str]) -> dict[str, Any]:
        return read_values(None, words)

    def check(self, base: Path, changes: Values) -> dict[str, Any]:
        given = check_recipe(str(base), _settings({**changes, "output_dir": "out"}))
        return {key: value for key, value in given.items() if key not in self.set_by_study}

    def comparable(self, given: Values) -> dict[str, Any]:
        settings = [f for cls in (ModelSettings, DataSettings, APTConfig) for f in fields(cls)]
        defaults = {f.name: f.default if f.default_factory is MISSING else f.default_factory() for f in settings}
        return defaults | dict(given)

    def words(self, base: Path, changes: Values, folder: Path, seed: int) -> list[str]:
        return ["--config", str(base), *_settings({**changes, "seed": seed, "output_dir": str(folder)})]

    def resume(self, folder: Path) -> list[str] | None:
        found = folder.is_dir() and get_last_checkpoint(str(folder)) is not None
        return ["--resume_from_checkpoint=true"] if found else None


@dataclass(frozen=True)
class OptionsCommand:
    """A verb whose base file holds options.

    ``add_arguments``: those of the verb; ``check_options``: raises :class:`UserError` for values that do not go
    together; ``progress``: the file from which a stopped run goes on.
    """

    name: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    check_options: Callable[[argparse.Namespace], None]
    progress: str
    set_by_study: tuple[str, ...] = ("output", "seed", "resume")
    writes_recipe: bool = False

    def overrides(self, words: Sequence[str]) -> dict[str, Any]:
        read: dict[str, Any] = {}
        for key, given in split_overrides(words).items():
            read[key] = None if given == ["null"] else given if len(given) > 1 else given[0] if given else True
        return read

    def check(self, base: Path, changes: Values) -> dict[str, Any]:
        parser = _Parser(prog=self.name, allow_abbrev=False, add_help=False)
        self.add_arguments(parser)
        args = parser.parse_args(_options(read_file(str(base)) | dict(changes) | {"output": "out"}))
        self.check_options(args)
        given = {key: value for key, value in vars(args).items() if value != parser.get_default(key)}
        return {key: value for key, value in given.items() if key not in self.set_by_study}

    def comparable(self, given: Values) -> dict[str, Any]:
        return dict(given)

    def words(self, base: Path, changes: Values, folder: Path, seed: int) -> list[str]:
        return _options(read_file(str(base)) | dict(changes) | {"output": str(folder), "seed": seed})

    def resume(self, folder: Path) -> list[str] | None:
        return ["--resume"] if (folder / self.progress).is_file() else None


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}. See apt-trainer {self.prog} --help.")


def told_of_base(error: UserError) -> str:
    """What is wrong, without the name of a command line that nobody typed."""
    return str(error).removeprefix(f"{COMMAND_LINE}: ")


def _settings(values: Values) -> list[str]:
    """Overrides for the command line; what JSON writes is read back as the same value, texts being in quotes."""
    return [f"--{key}={json.dumps(value, ensure_ascii=False)}" for key, value in values.items()]


def _options(values: Values) -> list[str]:
    words: list[str] = []
    for key, value in values.items():
        if value is True:
            words.append(f"--{key}")
        elif isinstance(value, list):
            words += [f"--{key}", *map(str, value)]
        elif value is not None and value is not False:
            words.append(f"--{key}={value}")
    return words
