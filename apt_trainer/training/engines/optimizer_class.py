"""Which optimizer trains: a class and its options, of which a new one is made after each change of shape.

Not for its groups (``groups``), nor for its state (``state``).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from transformers import Trainer

from apt_trainer.errors import UserError
from apt_trainer.settings.fsdp import wants_fsdp
from apt_trainer.training.trainer_class import overrides

ClassAndOptions = tuple[Any, Mapping[str, Any]]

_OF_ONE_MODEL = ("params", "model", "optimizer_dict")
"""Options that hold parameters."""
_WHOLE_STATE = (torch.optim.AdamW, torch.optim.SGD)
"""Classes whose state FSDP2 can split."""


def check_objects(optimizers: Any) -> None:
    """Raise :class:`UserError` for an optimizer or a schedule that was made already."""
    given = [one for one in optimizers or () if one is not None]
    if given:
        raise UserError(
            f"optimizers holds {' and '.join(type(one).__name__ for one in given)}, made for the parameters of the "
            "dense model, which adapters and cuts replace. Give optimizer_cls_and_kwargs=(a class, its options), or "
            "optim and learning_rate; for the schedule lr_scheduler_type and lr_scheduler_kwargs, or override "
            "create_scheduler."
        )


def check_optimizer(
    args: Any,
    given: ClassAndOptions | None = None,
    choose: Callable[..., ClassAndOptions] = Trainer.get_optimizer_cls_and_kwargs,
    model: nn.Module | None = None,
) -> None:
    """Raise :class:`UserError` for an optimizer that cannot be made, or not anew for other parameters.

    Args:
        args: Training arguments.
        given: Class and options of the user's own, instead of ``optim``.
        choose: What makes class and options of ``args`` and ``model`` otherwise.
    """
    name = "optimizer_cls_and_kwargs" if given is not None else f"optim: {getattr(args.optim, 'value', args.optim)}"
    try:
        cls, options = given or choose(args, model)
    except (ImportError, ValueError, TypeError) as error:
        raise UserError(f"{name} cannot be used: {str(error).strip().splitlines()[0]}") from error
    if not (isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer)):
        raise UserError(
            f"{name} is no class of optimizers ({cls!r}), of which a new one can be made after each change of shape. "
            "Give a subclass of torch.optim.Optimizer and its options."
        )
    held = [option for option in _OF_ONE_MODEL if option in options]
    if held:
        raise UserError(
            f"{name} has the option {held[0]}, which holds parameters of the dense model, but shapes change. Use an "
            "optimizer that takes any parameters, such as adamw_torch."
        )
    try:
        cls([{"params": [nn.Parameter(torch.zeros(1))], "weight_decay": args.weight_decay}], **options)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{name} cannot be made: {str(error).strip().splitlines()[0]}") from error
    closure = inspect.signature(cls.step).parameters.get("closure")  # type: ignore[attr-defined]
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise UserError(f"{name} is {cls.__name__}, which computes the loss itself, several times a step. Use AdamW.")
    if given is not None and wants_fsdp(args) and cls not in _WHOLE_STATE:
        raise UserError(f"{name} is {cls.__name__}, which is not supported under FSDP. Use AdamW or SGD of torch.")


def check_overrides(trainer: Any, stock: type) -> None:
    """Raise :class:`UserError` for methods of a subclass that would not be called, or not followed.

    ``stock``: the class of whose methods overriding is meant.
    """
    own, name = type(trainer), type(trainer).__name__
    if own.create_optimizer_and_scheduler is not Trainer.create_optimizer_and_scheduler:
        raise UserError(
            f"{name} overrides create_optimizer_and_scheduler, which the training loop does not call. Override "
            "create_optimizer and create_scheduler."
        )
    splits = trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled
    is_overridden = own.create_optimizer is not stock.create_optimizer  # type: ignore[attr-defined]
    if splits and (is_overridden or overrides(trainer.trainer_class, "create_optimizer")):
        raise UserError(
            f"{name} overrides create_optimizer, but under DeepSpeed and FSDP parameters are grouped by their age. "
            "Override get_optimizer_cls_and_kwargs or get_decay_parameter_names, or give optimizer_cls_and_kwargs."
        )
