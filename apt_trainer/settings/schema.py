"""JSON schema of a recipe: what an editor needs to complete and check its keys.

Made from the same dataclasses as the command line: types, choices, defaults and help. Not for checking recipes at run
time: :mod:`apt_trainer.settings.recipe` says more in its errors.
"""

from __future__ import annotations

import json
import types
from collections.abc import Mapping
from dataclasses import MISSING, Field, fields
from enum import Enum
from typing import Any, Literal, Union, get_args, get_origin

from apt_trainer.settings import CHOICES, PRUNE_TARGETS, known_settings
from apt_trainer.settings.presets import KEYS
from apt_trainer.settings.recipe import key_groups

DRAFT = "http://json-schema.org/draft-07/schema#"
Schema = dict[str, Any]

_PLAIN = {
    type(None): "null",
    bool: "boolean",
    int: "integer",
    float: "number",
    str: "string",
    list: "array",
    dict: "object",
}
_LOOSE = ("boolean", "array", "object")
_ITEMS = {"prune_targets": PRUNE_TARGETS}


def recipe_schema() -> Schema:
    """Schema of one recipe, for the installed version of transformers."""
    own, properties = known_settings(), {}
    for cls, hints in key_groups().items():
        declared = {f.name: f for f in fields(cls)}
        for name, hint in hints.items():
            properties[name] = _property(declared[name], hint, loose=name not in own)
    for name, hint in KEYS.items():
        properties[name] = {**type_schema(hint), "description": "Older key: see preset_overrides.", "deprecated": True}
    return closed("A recipe of apt_trainer", properties)


def closed(title: str, properties: Mapping[str, Schema]) -> Schema:
    """Schema of a mapping that has no other keys than these."""
    return {
        "$schema": DRAFT,
        "title": title,
        "type": "object",
        "properties": dict(properties),
        "additionalProperties": False,
    }


def as_text(schema: Schema) -> str:
    """``schema`` as a file holds it."""
    return json.dumps(schema, indent=1, ensure_ascii=False) + "\n"


def _property(declared: Field[Any], hint: Any, loose: bool) -> Schema:
    """``loose``: transformers takes more of this key than its annotation says."""
    found = type_schema(hint)
    choices = CHOICES.get(declared.name)
    if choices is not None:
        found = {"enum": [*choices, *([None] if type(None) in get_args(hint) else [])]}
    if declared.name in _ITEMS:
        found["items"] = {"enum": list(_ITEMS[declared.name])}
    if loose and str in get_args(hint) and "type" in found:
        found["type"] = list(dict.fromkeys([*_listed(found["type"]), *_LOOSE]))
    found["description"] = declared.metadata["help"]
    default = declared.default if declared.default_factory is MISSING else declared.default_factory()
    default = default.value if isinstance(default, Enum) else default
    if isinstance(default, (str, bool, int, float, list, dict)) or default is None:
        found["default"] = default
    return found


def type_schema(hint: Any) -> Schema:
    """What YAML may hold where a dataclass has this annotation; anything, where YAML cannot write it."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return _any_of([type_schema(arg) for arg in args])
    if origin is Literal:
        return {"enum": list(args)}
    if origin is list:
        items = type_schema(args[0])
        return {"type": "array", **({"items": items} if items else {})}
    if origin is dict:
        return {"type": "object"}
    if isinstance(hint, type) and issubclass(hint, Enum):
        return {"enum": [member.value for member in hint]}
    return {"type": _PLAIN[hint]} if hint in _PLAIN else {}


def _any_of(parts: list[Schema]) -> Schema:
    """The least schema that takes what one of ``parts`` takes; names of an enumeration are not any text as well."""
    if not all(parts):
        return {}
    names = [value for part in parts for value in part.get("enum", ())]
    if names:
        null = [None] if {"type": "null"} in parts else []
        return {"enum": [*names, *null]}
    found = {"type": [kind for part in parts for kind in _listed(part["type"])]}
    items = [part["items"] for part in parts if "items" in part]
    return {**found, **({"items": items[0]} if items else {})}


def _listed(kind: Any) -> list[str]:
    return kind if isinstance(kind, list) else [kind]
