"""What lets a shell complete verbs, options and the keys of recipes."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from apt_trainer.settings.packages import SHTAB, require

SHELLS = ("bash", "zsh", "tcsh")


class PrintCompletion(argparse.Action):
    """``--print-completion SHELL``: print the completion of this parser, whose verbs take settings, and exit."""

    def __init__(self, *args: Any, commands: Mapping[str, argparse.ArgumentParser], **kwargs: Any) -> None:
        """``commands``: the parsers of all verbs, when it is called."""
        super().__init__(*args, **kwargs)
        self._commands = commands

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        require(SHTAB, "--print-completion")
        import shtab

        _add_settings(self._commands)
        print(shtab.complete(parser, shell=str(values)))
        parser.exit()


def _add_settings(commands: Mapping[str, argparse.ArgumentParser]) -> None:
    """Let verbs that take settings know each of them as an option, as ``train --key value`` does."""
    from apt_trainer.cli import VERBS
    from apt_trainer.settings.schema import recipe_schema

    settings = recipe_schema()["properties"]
    for name, command in commands.items():
        for key, of_key in settings.items() if _takes_settings(VERBS[name]) else ():
            choices = [str(value) for value in of_key.get("enum", ())] or None
            told = of_key["description"].replace("%", "%%")
            with suppress(argparse.ArgumentError):  # an option of the verb itself
                command.add_argument(f"--{key}", nargs="*", choices=choices, help=told)


def _takes_settings(module: str) -> bool:
    from importlib import import_module

    return bool(import_module(module).TAKES_SETTINGS)
