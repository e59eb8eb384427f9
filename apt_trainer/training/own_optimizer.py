"""The optimizer of a Trainer with the method: made anew after each change of shape, with groups of the method's own.

See ``training.engines`` for its state, and ``training.engines.optimizer_class`` for what is refused before.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from apt_trainer.errors import UserError
from apt_trainer.surgery.tuning import base_weight_names
from apt_trainer.training.engines.base import plain_optimizer
from apt_trainer.training.engines.groups import parameter_groups
from apt_trainer.training.engines.optimizer_class import ClassAndOptions, check_optimizer, check_overrides
from apt_trainer.training.inside import without_own_groups


class OwnOptimizer:
    """Two learning rates: ``full_learning_rate`` for base weights, ``learning_rate`` for adapters and head.

    Args:
        trainer: whose model trains.
        given: class and options of the user's own, instead of ``args.optim``.
    """

    def __init__(self, trainer: Any, given: ClassAndOptions | None) -> None:
        self._trainer, self._given = trainer, given
        self.ages: Mapping[str, int] = {}
        """Steps that parameters trained for by name, where an engine keeps one count per group; else empty."""

    def check(self, stock: type, model: nn.Module) -> None:
        """Before a run: raise :class:`UserError` for what cannot be made, or is overridden in vain. ``stock``: the
        class of whose methods overriding is meant."""
        check_overrides(self._trainer, stock)
        check_optimizer(self._trainer.args, self._given, self._chosen, model)

    def make(self, model: nn.Module) -> torch.optim.Optimizer:
        """A new one for all that trains in ``model``."""
        cls, options = self._class_and_options(model)
        return cls(self.groups(model), **options)  # type: ignore[no-any-return]

    def groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Groups of all that trains in ``model``: by learning rate, by weight decay, and by age."""
        trainer, args = self._trainer, self._trainer.args
        rate = self._class_and_options(model)[1].get("lr", args.learning_rate)
        own_options = self._given[1] if self._given else {}
        inner = model.get_submodule(trainer.place)
        prefix = f"{trainer.place}." if trainer.place else ""
        return parameter_groups(
            model,
            base={prefix + name for name in base_weight_names(inner, trainer.pruner.family)},
            ages=self.ages,
            rates={True: args.full_learning_rate or rate, False: rate},
            weight_decay=own_options.get("weight_decay", args.weight_decay),
            decayed=set(trainer.get_decay_parameter_names(model)),
        )

    def check_made(self) -> None:
        """Once an engine is made: raise :class:`UserError` where a subclass has made an optimizer that does not hold
        all that trains, or a schedule that cannot be put back after a change of shape."""
        trainer = self._trainer
        if trainer.is_deepspeed_enabled:  # it holds flat parts, and none that a subclass makes is let pass
            return
        optimizer, model = plain_optimizer(trainer), trainer.accelerator.unwrap_model(trainer.model_wrapped)
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        trained = {name: id(p) for name, p in model.named_parameters() if p.requires_grad}
        left_out = [name for name, parameter in trained.items() if parameter not in held]
        if left_out:
            raise UserError(
                f"The optimizer that create_optimizer of {type(trainer).__name__} made lacks {len(left_out)} of the "
                f"{len(trained)} parameters that train, such as {left_out[0]}. It is called after each change of "
                "shape, with self.optimizer None: let it make a new one of all that requires a gradient."
            )
        if not hasattr(trainer.lr_scheduler, "lr_lambdas") or plain_optimizer(trainer.lr_scheduler) is not optimizer:
            raise UserError(
                f"create_scheduler of {type(trainer).__name__} must set self.lr_scheduler to a LambdaLR of "
                f"self.optimizer, but it is {type(trainer.lr_scheduler).__name__}: of others the position cannot be "
                "put back after a change of shape. See transformers.get_scheduler."
            )

    # ------------------------------------------------------------------ inside

    def _class_and_options(self, model: nn.Module) -> ClassAndOptions:
        return self._given or self._chosen(self._trainer.args, model)

    def _chosen(self, args: Any, model: nn.Module) -> ClassAndOptions:
        """What ``args.optim`` names, less groups that a Trainer has made itself."""
        cls, options = self._trainer.get_optimizer_cls_and_kwargs(args, model)
        return cls, without_own_groups(options, model) if self._trainer.place else options
