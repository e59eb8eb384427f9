"""JSON schema of a study, and of the options that a study of another verb than ``train`` starts from."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from apt_trainer.settings.schema import Schema, closed
from apt_trainer.studies.ablation.commands import Command, OptionsCommand

RECIPE = "recipe"


def schema_name(command: Command) -> str:
    """Name of the file with the schema of the keys that variants of ``command`` change."""
    return command.name if isinstance(command, OptionsCommand) else RECIPE


class _Noted:
    """Takes what is added to a parser or its groups, and notes it."""

    def __init__(self) -> None:
        self._parser, self.actions = argparse.ArgumentParser(add_help=False), list[argparse.Action]()

    def add_argument(self, *names: str, **how: Any) -> argparse.Action:
        self.actions.append(self._parser.add_argument(*names, **how))
        return self.actions[-1]

    def add_argument_group(self, *args: Any, **kwargs: Any) -> _Noted:
        return self

    add_mutually_exclusive_group = add_argument_group


def options_schema(command: OptionsCommand) -> Schema:
    """Schema of a base file of ``command``: its options, as ``apt-trainer VERB --help`` names them."""
    noted: Any = _Noted()
    command.add_arguments(noted)
    properties = {action.dest: _option(action) for action in noted.actions if action.option_strings}
    return closed(f"Options of apt-trainer {command.name} for a study", properties)


def study_schema(commands: Sequence[Command]) -> Schema:
    """Schema of a study of one of ``commands``, the default first; those of its variants lie beside it."""
    text = {"type": "string"}
    properties: dict[str, Schema] = {
        "command": {"enum": [command.name for command in commands], "default": commands[0].name},
        "base": text | {"description": "File that all variants start from, as seen from the folder of the study."},
        "output_dir": text | {"description": "Folder of all runs: VARIANT/seed-N in it."},
        "seeds": {"type": "array", "items": {"type": "integer"}, "minItems": 1, "uniqueItems": True},
        "variants": {
            "type": "object",
            "minProperties": 1,
            "propertyNames": {"pattern": "^[A-Za-z0-9][A-Za-z0-9_.-]*$"},
            "additionalProperties": {"type": ["object", "null"]},
            "description": "Name of each variant, and the keys that it changes.",
        },
        "common": {"type": ["object", "null"], "description": "Keys that all variants change."},
        "baseline": {"type": ["string", "null"], "description": "Variant that others are compared with."},
        "metrics": {
            "type": ["array", "null"],
            "items": text,
            "minItems": 1,
            "description": "Keys of metrics.json in the table, such as latency_ms.pruned.1.median_ms.",
        },
    }
    return closed("A study of apt_trainer", properties) | {
        "required": ["base", "output_dir", "seeds", "variants"],
        "allOf": [_of_command(command, command is commands[0]) for command in commands],
    }


def _of_command(command: Command, is_default: bool) -> Schema:
    """What variants may change where the study is of ``command``."""
    keys: Schema = {"$ref": f"{schema_name(command)}.json"}
    nullable: Schema = {"anyOf": [keys, {"type": "null"}]}
    asked: Schema = {"properties": {"command": {"const": command.name}}}
    return {
        "if": asked if is_default else asked | {"required": ["command"]},
        "then": {"properties": {"variants": {"additionalProperties": nullable}, "common": nullable}},
    }


def _option(action: argparse.Action) -> Schema:
    found: Schema = {"description": " ".join((action.help or "").replace("%%", "%").split())}
    if action.choices is not None:
        kind: Schema = {"enum": list(action.choices)}
    else:
        kind = {"type": _kind(action)}
    several = action.nargs in ("+", "*")
    nothing: Schema = {"type": "null"}
    takes = [kind, nothing, *([{"type": "array", "items": kind}] if several else [])]
    return found | {"anyOf": takes}


def _kind(action: argparse.Action) -> Any:
    if action.nargs == 0 or isinstance(action, argparse.BooleanOptionalAction):
        return "boolean"
    if isinstance(action.default, int) or action.type is int:
        return "integer"
    if action.type is float or isinstance(action.default, float):
        return "number"
    return ["string", "number"]  # a word of the command line, which YAML may read as a number
