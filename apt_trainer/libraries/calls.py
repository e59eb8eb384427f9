"""How a module of transformers is called: what a release names its arguments is read from the module, not assumed.

An attention got its cache as ``past_key_values`` (``layer_past`` in GPT-NeoX) until transformers 5.23, and gets it as
``cache`` since. Not for what modules compute.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from transformers import Cache

_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def positional_names(module_class: type[nn.Module]) -> tuple[str, ...]:
    """Names of what ``forward`` of ``module_class`` may be given by position, in their order."""
    parameters = list(inspect.signature(module_class.forward).parameters.values())[1:]
    return tuple(parameter.name for parameter in parameters if parameter.kind in _POSITIONAL)


def by_name(names: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """All arguments of a call by name; ``names``: :func:`positional_names` of what is called."""
    return dict(zip(names, args, strict=False)) | dict(kwargs)


def cache_in(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Cache | None:
    """The key-value cache among the arguments of a call, known by its type; None where there is none."""
    return next((value for value in (*args, *kwargs.values()) if isinstance(value, Cache)), None)


def cache_name(model: nn.Module) -> str:
    """The name under which ``model`` takes and returns its key-value cache."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
