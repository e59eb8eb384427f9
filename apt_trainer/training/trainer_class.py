"""What a class of Trainers takes: its arguments by name, its settings, and the data sets that it makes itself.

Not for what is done with any of it (``trainer``).
"""

from __future__ import annotations

import inspect
import sys
import typing
from collections.abc import Iterator, Mapping
from typing import Any

import transformers
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainingArguments

from apt_trainer.errors import UserError

HELDOUT = "apt_heldout"
"""Key of the held-out data among the data sets for evaluation, while the Trainer makes its own of them."""


def by_name(trainer_class: type[Trainer], args: tuple[Any, ...]) -> dict[str, Any]:
    """Arguments by position as ``trainer_class`` names them; raises :class:`UserError` where it has not so many."""
    names = [p.name for p in _parameters(trainer_class) if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
    if len(args) > len(names):
        raise UserError(f"{trainer_class.__name__} takes {len(names)} arguments by position, not {len(args)}.")
    return dict(zip(names, args, strict=False))


def takes(trainer_class: type[Trainer], name: str) -> bool:
    """Whether ``trainer_class`` has an argument ``name``."""
    return any(parameter.name == name for parameter in _parameters(trainer_class))


def arguments_class(trainer_class: type[Trainer]) -> type[TrainingArguments]:
    """Class of training arguments that ``trainer_class`` names for its ``args``, or else that of its base."""
    for owner in trainer_class.__mro__:
        init = vars(owner).get("__init__")
        parameter = inspect.signature(init).parameters.get("args") if init is not None else None
        if parameter is None or parameter.kind is not inspect.Parameter.POSITIONAL_OR_KEYWORD:
            continue
        found = [cls for cls in _classes(parameter.annotation, owner) if issubclass(cls, TrainingArguments)]
        if found:
            narrowest = max(found, key=lambda cls: len(cls.__mro__))
            is_stock = narrowest is TrainingArguments and issubclass(trainer_class, Seq2SeqTrainer)
            return Seq2SeqTrainingArguments if is_stock else narrowest
    return TrainingArguments


def overrides(trainer_class: type[Trainer], method: str) -> bool:
    """Whether ``trainer_class`` has a ``method`` of its own, not the Trainer's."""
    return getattr(trainer_class, method) is not getattr(Trainer, method)


def makes_datasets(trainer_class: type[Trainer]) -> bool:
    """Whether ``trainer_class`` trains on data sets that it makes of those it is given, as TRL's classes do."""
    return hasattr(trainer_class, "_prepare_dataset")


def with_heldout(evaluation: Any, heldout: Any) -> dict[str, Any]:
    """Data sets for evaluation, with those held out among them, so that a Trainer makes its own of all."""
    named = evaluation if isinstance(evaluation, Mapping) else {} if evaluation is None else {"": evaluation}
    return {**named, HELDOUT: heldout}


def without_heldout(made: dict[str, Any]) -> tuple[Any, Any]:
    """(data sets for evaluation as they were before :func:`with_heldout`, those held out)"""
    rest = {name: data for name, data in made.items() if name != HELDOUT}
    return (rest[""] if list(rest) == [""] else rest or None), made[HELDOUT]


def _parameters(trainer_class: type[Trainer]) -> list[inspect.Parameter]:
    """Those of the first ``__init__`` that names its arguments."""
    for owner in trainer_class.__mro__:
        init = vars(owner).get("__init__")
        if init is not None:
            found = list(inspect.signature(init).parameters.values())[1:]
            if not any(parameter.kind is inspect.Parameter.VAR_POSITIONAL for parameter in found):
                return found
    return []


def _classes(annotation: Any, owner: type) -> Iterator[type]:
    """The classes in ``annotation`` of a method of ``owner``; names that cannot be found are left out."""
    if isinstance(annotation, typing.ForwardRef):
        annotation = annotation.__forward_arg__
    if isinstance(annotation, str):
        names = vars(sys.modules[owner.__module__])
        for part in annotation.replace('"', "").replace("'", "").split("|"):
            name = part.strip().removeprefix("Optional[").removesuffix("]")
            found = names.get(name) or getattr(transformers, name, None)
            if isinstance(found, type):
                yield found
        return
    if isinstance(annotation, type):
        yield annotation
    for part in typing.get_args(annotation):
        yield from _classes(part, owner)
