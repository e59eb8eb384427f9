"""Recipes: one flat YAML file plus command-line overrides become checked settings.

The keys of a recipe are the fields of three dataclasses (model, data, training) in one flat namespace. Parsed here
rather than with TRL's or transformers' argument parsers because those neither suggest the nearest key, nor take
``null`` on the command line, nor check the type of what a file says. YAML scalars follow YAML 1.2: ``2e-4`` is a
number, ``no`` and ``off`` are text. Not for reading data or models.
"""

from __future__ import annotations

import difflib
import json
import math
import re
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from enum import Enum
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from apt_trainer.errors import UserError
from apt_trainer.settings import DataSettings, MethodSettings, ModelSettings, check_choices, known_settings
from apt_trainer.settings.presets import KEYS, with_presets
from apt_trainer.settings.shipped import find_file, recipe_names

if TYPE_CHECKING:
    from apt_trainer.settings.config import APTConfig

COMMAND_LINE = "command line"
_STEPS_OF_TRANSFORMERS = ("warmup_steps", "eval_steps", "save_steps", "logging_steps")


@dataclass(frozen=True)
class Recipe:
    """Everything one run needs.

    Attributes:
        model: which pretrained model.
        data: which data.
        training: the method's settings and those of the Hugging Face ``TrainingArguments``.
        path: the recipe file, if there was one.
        given: the keys that the file or the command line set, with their values; all others have their defaults.
    """

    model: ModelSettings
    data: DataSettings
    training: APTConfig
    path: str | None
    given: dict[str, Any]


def load_recipe(path: str | None, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file, apply command-line overrides and build the settings.

    Args:
        path: a YAML file with one flat mapping, or the name of a shipped one; None to use the overrides alone.
        overrides: words such as ``["--learning_rate", "2e-4", "--prune_targets", "heads", "neurons", "--bf16"]``.

    Raises:
        UserError: for an unreadable file, an unknown key, a wrong type, a missing ``output_dir``, or a value that
            the settings refuse.
    """
    from apt_trainer.settings.config import APTConfig

    given = check_recipe(path, overrides)
    values = {key: _all_steps(key, value) for key, value in given.items()}
    parts = {cls: {key: values[key] for key in values if key in names} for cls, names in key_groups().items()}
    try:
        training = APTConfig(**parts[APTConfig])
    except (ValueError, ImportError) as error:
        raise UserError(f"{path or COMMAND_LINE}: {error}") from error
    return Recipe(ModelSettings(**parts[ModelSettings]), DataSettings(**parts[DataSettings]), training, path, given)


def check_recipe(path: str | None, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """All of :func:`load_recipe` that touches no device: read the keys and check this package's settings.

    Returns:
        The keys that the file or the command line set, with their values.

    Raises:
        UserError: as :func:`load_recipe`, except for what only ``TrainingArguments`` can tell.
    """
    given = read_values(path, overrides)
    source = path or COMMAND_LINE
    if given.get("output_dir") is None:
        raise UserError(f"{source}: output_dir is missing. Say where to write, for example --output_dir out/run1.")
    try:
        for cls in (ModelSettings, DataSettings, MethodSettings):
            settings = cls(**{f.name: given[f.name] for f in fields(cls) if f.name in given})
            settings.check() if isinstance(settings, MethodSettings) else check_choices(settings)
    except UserError as error:
        raise UserError(f"{source}: {error}") from error
    return given


def read_values(path: str | None, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Read the keys of a recipe and its overrides and check their names and types.

    Raises:
        UserError: for an unreadable file, an unknown key or a wrong type.
    """
    hints = {name: hint for names in key_groups().values() for name, hint in names.items()} | KEYS
    values: dict[str, Any] = {}
    if path is not None:
        for key, value in read_file(path).items():
            _check_key(path, key, hints)
            values[key] = _pick(path, key, [value], hints[key])
    for key, words in split_overrides(overrides).items():
        _check_key(COMMAND_LINE, key, hints)
        hint = hints[key]
        if [_scalar(word) for word in words] == [None] and _takes_list(hint) and not _fits(None, hint):
            values[key] = _default(key)  # else a list that holds the text "null"
        else:
            values[key] = _pick(COMMAND_LINE, key, _readings(words, hint), hint)
    return with_presets(path or COMMAND_LINE, values)


def _all_steps(key: str, value: Any) -> Any:
    """``value``; but for 1.0, the whole run, of a key of transformers, which reads 1.0 as one step: the largest
    fraction below 1, which it rounds up to all steps."""
    fraction = key in _STEPS_OF_TRANSFORMERS and isinstance(value, float)
    return math.nextafter(1.0, 0.0) if fraction and value == 1 else value


def key_groups() -> dict[type, dict[str, Any]]:
    """For each dataclass of settings, its fields that can be set, with their types."""
    from apt_trainer.settings.config import APTConfig

    groups: dict[type, dict[str, Any]] = {}
    for cls in (ModelSettings, DataSettings, APTConfig):
        hints = get_type_hints(cls)
        groups[cls] = {f.name: hints[f.name] for f in fields(cls) if f.init and not f.name.startswith("_")}
    names = [name for group in groups.values() for name in group]
    assert len(names) == len(set(names)), "a key is defined in two groups of settings"
    return groups


def _default(key: str) -> Any:
    found = next(f for cls in key_groups() for f in fields(cls) if f.name == key)
    return found.default if found.default_factory is MISSING else found.default_factory()


# ---- reading the file ----


class _RecipeLoader(yaml.SafeLoader):
    """Safe YAML with the scalars of YAML 1.2 and without duplicate keys."""

    yaml_implicit_resolvers: dict[str, Any] = {}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, str) and key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} appears twice", key_node.start_mark)
            if isinstance(key, str):
                seen.add(key)
        return super().construct_mapping(node, deep=deep)


_NUMBER_START = list("-+.0123456789")
_RecipeLoader.add_implicit_resolver(
    "tag:yaml.org,2002:null", re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""]
)
_RecipeLoader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_RecipeLoader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?(?:0|[1-9][0-9]*)$"), _NUMBER_START)
_RecipeLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"""^(?: [-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?
               | [-+]?[0-9]+[eE][-+]?[0-9]+
               | [-+]?\.(?:inf|Inf|INF) | \.(?:nan|NaN|NAN) )$""",
        re.VERBOSE,
    ),
    _NUMBER_START,
)


def read_file(path: str) -> dict[str, Any]:
    try:
        text = find_file(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        names = ", ".join(recipe_names())
        raise UserError(
            f"{path}: no such file. Give a recipe with --config, or one that comes with apt_trainer: {names}."
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as a recipe: {error}") from error
    try:
        content = yaml.load(text, Loader=_RecipeLoader)
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not a valid YAML file: {_yaml_problem(error)}") from error
    if content is None:
        raise UserError(
            f"{path}: the recipe is empty. Write one 'key: value' per line, for example output_dir: out/run1."
        )
    if not isinstance(content, dict):
        raise UserError(
            f"{path}: a recipe is a mapping, one 'key: value' per line, but the file holds {_content(content)}."
        )
    return content


def _yaml_problem(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or str(error)
    return f"line {mark.line + 1}: {problem}." if mark else f"{problem}."


def _content(content: Any) -> str:
    return "a list" if isinstance(content, list) else f"only {_shown(content)}"


# ---- reading the command line ----


def split_overrides(words: Sequence[str]) -> dict[str, list[str]]:
    """``--key a b --other=c --flag`` as {key: [a, b], other: [c], flag: []}; the last one of a repeated key counts."""
    found: dict[str, list[str]] = {}
    key: str | None = None
    for word in words:
        if word.startswith("--") and len(word) > 2:
            key, equals, value = word[2:].partition("=")
            key = key.replace("-", "_")
            found[key] = [value] if equals else []
        elif key is None:
            raise UserError(f"{COMMAND_LINE}: unexpected argument {word!r}. Overrides are written --key value.")
        else:
            found[key].append(word)
    return found


def _readings(words: list[str], hint: Any) -> list[Any]:
    """What the words of one override can mean, the likeliest first."""
    if not words:
        return [True]
    parsed = [_scalar(word) for word in words]
    if len(words) > 1:
        return [parsed, list(words)]
    readings = [parsed[0]]
    if parsed[0] is not None:
        readings.append(words[0])
    if _takes_list(hint) and not isinstance(parsed[0], list):
        readings += [parsed, list(words)]
    return readings


def _scalar(word: str) -> Any:
    """One word as YAML reads a scalar; ``[..]``, ``{..}`` and quoted text as YAML reads those."""
    try:
        if word[:1] in ("[", "{", '"', "'"):
            return yaml.load(word, Loader=_RecipeLoader)
        loader = _RecipeLoader("")
        tag = loader.resolve(yaml.ScalarNode, word, (True, False))
        return loader.construct_object(yaml.ScalarNode(tag, word))
    except yaml.YAMLError:
        return word


def _takes_list(hint: Any) -> bool:
    return any(get_origin(h) is list for h in (hint, *get_args(hint)))


# ---- checking ----


def _check_key(source: str, key: Any, known: Mapping[str, Any]) -> None:
    if key in known:
        return
    close = difflib.get_close_matches(str(key), known, n=1)
    hint = f"Did you mean {close[0]!r}?" if close else "All keys: apt-trainer train --help."
    raise UserError(f"{source}: unknown key {str(key)!r}. {hint}")


def _pick(source: str, key: str, readings: list[Any], hint: Any) -> Any:
    """The first reading that has the type of the field."""
    own = key in known_settings()
    for value in readings:
        if _fits(value, hint) or (not own and _is_loose(value, hint)):
            return value
    given = readings[0]
    advice = " Put it in quotes." if _fits("", hint) and isinstance(given, (bool, int, float)) else ""
    raise UserError(f"{source}: {key}={_shown(given)} has the wrong type: expected {_expected(hint)}.{advice}")


def _is_loose(value: Any, hint: Any) -> bool:
    """TrainingArguments takes more than its annotations say, for example resume_from_checkpoint: true."""
    return str in get_args(hint) and isinstance(value, (bool, list, dict))


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value read from YAML has the annotated type; types YAML cannot write are left to their owner."""
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(value, part) for part in get_args(hint))
    if origin is Literal:
        return any(value == part and type(value) is type(part) for part in get_args(hint))
    if origin is list:
        return isinstance(value, list) and all(_fits(item, part) for part in get_args(hint) for item in value)
    if origin is dict:
        return isinstance(value, dict)
    if isinstance(hint, type) and issubclass(hint, Enum):
        return isinstance(value, str)
    check = _PLAIN.get(hint)
    return check[1](value) if check else True


_PLAIN: dict[Any, tuple[str, Callable[[Any], bool]]] = {
    type(None): ("null", lambda v: v is None),
    bool: ("true or false", lambda v: isinstance(v, bool)),
    int: ("a whole number", lambda v: isinstance(v, int) and not isinstance(v, bool)),
    float: ("a number", lambda v: isinstance(v, (int, float)) and not isinstance(v, bool)),
    str: ("text", lambda v: isinstance(v, str)),
    list: ("a list", lambda v: isinstance(v, list)),
    dict: ("a mapping", lambda v: isinstance(v, dict)),
}


def _shown(value: Any) -> str:
    """A value as a recipe would write it, texts in quotes."""
    return repr(value) if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)


_ITEMS = {str: "texts", int: "whole numbers", float: "numbers"}


def _expected(hint: Any) -> str:
    """A type in words: ``list[int] | None`` is 'a list of whole numbers or null'."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(_expected(part) for part in args))
    if origin is Literal:
        return " or ".join(repr(part) for part in args)
    if origin is list:
        return f"a list of {_ITEMS.get(args[0], 'values')}"
    if origin is dict:
        return "a mapping"
    if hint in _PLAIN:
        return _PLAIN[hint][0]
    return "text" if issubclass(hint, Enum) else f"a {hint.__name__}"
