"""The only file that touches the engine: optimizer, scheduler and wrapper, rebuilt after the model's shape changed.

:func:`reshape` runs a change on the plain model in the middle of ``Trainer.train()`` and goes on with optimizer
moments, learning-rate schedule and random state as they were. One process and DDP; other engines are refused.
Not for deciding what changes (``pruner``).
"""

from __future__ import annotations

import ctypes
import gc
import hashlib
import sys
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import Trainer

from apt_trainer.errors import UserError
from apt_trainer.pruning.slicing import Grow, Keep

Edits = Mapping[str, list[Keep | Grow]]
State = dict[str, dict[str, Any]]
"""Parameter name → {state name: tensor or number} of the optimizer."""


class LiveModel:
    """Stands for the wrapped model in the frames of the training loop, which keep it in a local variable for the
    whole run; forwards everything to the wrapper of the moment."""

    def __init__(self, trainer: Trainer) -> None:
        self.__dict__["_trainer"] = weakref.ref(trainer)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_trainer"]().model_wrapped, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.__dict__["_trainer"]().model_wrapped(*args, **kwargs)


def check_engine(trainer: Trainer) -> None:
    """Raise :class:`UserError` for engines under which shapes cannot change yet."""
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        engine = "DeepSpeed" if trainer.is_deepspeed_enabled else "FSDP"
        raise UserError(f"Shapes cannot change under {engine} yet. Run in one process or with DDP.")
    if trainer.args.lr_scheduler_type in ("reduce_lr_on_plateau", "greedy"):
        raise UserError(
            f"lr_scheduler_type={str(trainer.args.lr_scheduler_type.value)!r} follows a metric, which a change of "
            "shape interrupts. Use one that follows the step, for example linear or cosine."
        )
    if trainer.args.load_best_model_at_end:
        raise UserError(
            "load_best_model_at_end would choose among models of different sizes. Remove it; the teacher is "
            "chosen on held-out data already."
        )
    if trainer.args.auto_find_batch_size:
        raise UserError("auto_find_batch_size restarts training on a model that may be cut already. Switch it off.")


def plain_optimizer(trainer: Trainer) -> torch.optim.Optimizer:
    """The torch optimizer under accelerate's wrapper."""
    optimizer: Any = trainer.optimizer
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer  # type: ignore[no-any-return]


def plain_model(trainer: Any) -> Any:
    """The model under all wrappers, with its own forward."""
    model = trainer.accelerator.unwrap_model(trainer.model_wrapped)
    restore_forward(model)
    return model


def restore_forward(model: nn.Module) -> None:
    """Take accelerate's mixed precision off ``model.forward``, in place.

    ``unwrap_model(keep_fp32_wrapper=False)`` would take the decorators of the model's own forward off with it.
    """
    original = model.__dict__.pop("_original_forward", None)
    if original is not None:
        del model.__dict__["forward"]
        if original != model.forward:
            model.forward = original


def own_storage(model: nn.Module) -> None:
    """Give every parameter on the CPU memory of its own, in place.

    Weights read from a file lie in one mapping of that file, which stays in memory as a whole while any tensor of it
    lives: what a cut removes would not be given back.
    """
    for parameter in model.parameters():
        if parameter.device.type == "cpu":
            parameter.data = parameter.data.clone()


def collect(model: nn.Module, optimizer: torch.optim.Optimizer) -> State:
    """Optimizer state of every trained parameter by name.

    State in another shape than its parameter (factored, quantised) cannot follow a cut and is left out.
    """
    named = [(name, p, optimizer.state[p]) for name, p in model.named_parameters() if p in optimizer.state]
    return {name: dict(state) for name, p, state in named if all(_has_shape(value, p) for value in state.values())}


def carry(state: State, edits: Edits) -> State:
    """Optimizer state after ``edits``: entries of survivors as they were; new entries start at zero, but second
    moments at the mean of the old ones, since Adam would otherwise move them several times too far."""
    carried: State = {}
    for name, of_parameter in state.items():
        carried[name] = {key: _follow(value, key, edits.get(name, [])) for key, value in of_parameter.items()}
    return carried


def restore(model: nn.Module, optimizer: torch.optim.Optimizer, state: State) -> None:
    """Give ``state`` to the parameters of the same names; those without (new to training) start afresh."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and name in state:
            optimizer.state[parameter] = state[name]


def reshape(trainer: Any, change: Callable[[], Edits]) -> None:
    """Run ``change`` on the plain model between two steps and rebuild the engine round the result.

    Must be called by all processes at the same step, from ``on_step_end``: gradients are cleared then and the
    next batch is not fetched. ``change`` edits the model in place and returns what happened to each parameter.
    """
    cpu_rng = torch.random.get_rng_state()
    model = plain_model(trainer)
    optimizer = plain_optimizer(trainer)
    state = collect(model, optimizer)
    schedule = trainer.lr_scheduler.state_dict()
    optimizer.state.clear()
    _fresh_leaves(model)
    edits = change()
    state = carry(state, edits)
    _agree(model)
    optimizer.param_groups.clear()  # the old scheduler still refers to it: it must not keep old parameters alive
    _rebuild(trainer, model, schedule)
    restore(model, plain_optimizer(trainer), state)
    for attribute in ("model", "optimizer", "lr_scheduler"):
        setattr(trainer.callback_handler, attribute, getattr(trainer, attribute))
    trainer.model_wrapped.train()
    release_memory(collect=trainer.args.world_size > 1)
    torch.random.set_rng_state(cpu_rng)


def reshape_first(trainer: Any, change: Callable[[], Edits]) -> None:
    """As :func:`reshape`, before training has begun: there is no engine to rebuild and no optimizer state."""
    change()
    _agree(trainer.model)
    release_memory()


def release_memory(collect: bool = True) -> None:
    """Give freed memory back to the system; ``collect`` breaks reference cycles first."""
    if collect:
        gc.collect()
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()
    elif sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc only
        if trim is not None:
            trim(0)


def _has_shape(value: Any, parameter: nn.Parameter) -> bool:
    return not torch.is_tensor(value) or value.dim() == 0 or value.shape == parameter.shape


def _follow(value: Any, key: str, edits: list[Keep | Grow]) -> Any:
    if not torch.is_tensor(value) or value.dim() == 0:
        return value
    for edit in edits:
        if isinstance(edit, Keep):
            value = value.index_select(edit.dim, edit.index.to(value.device))
        else:
            shape = list(value.shape)
            shape[edit.dim] = edit.extra
            fill = value.mean() if key == "exp_avg_sq" else value.new_zeros(())
            value = torch.cat([value, fill.expand(shape)], edit.dim)
    return value


def _fresh_leaves(model: nn.Module) -> None:
    """New Parameter objects for everything that trains, so that hooks of an old reducer cannot fire on them."""
    fresh: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.requires_grad:
                new = fresh.setdefault(id(parameter), nn.Parameter(parameter.data))
                module._parameters[name] = new
    for parameter in model.parameters():
        parameter.grad = None


def _rebuild(trainer: Any, model: nn.Module, schedule: dict[str, Any]) -> None:
    """Hugging Face's own preparation once more, with the schedule where it was."""
    accelerator = trainer.accelerator
    accelerator._models.clear()
    accelerator._optimizers.clear()
    accelerator._schedulers.clear()
    model.__dict__.pop("_is_accelerate_prepared", None)
    trainer.model = trainer.model_wrapped = model
    trainer.optimizer = trainer.lr_scheduler = None
    trainer._mixed_mesh_grads = None
    Trainer._prepare_for_training(trainer, trainer.state.max_steps, trainer.live_dataloader, None)
    position = schedule["last_epoch"]
    trainer.lr_scheduler.last_epoch = position
    trainer.lr_scheduler._step_count = schedule["_step_count"]
    groups = plain_optimizer(trainer).param_groups
    rates = [
        base * rate(position)
        for base, rate in zip(trainer.lr_scheduler.base_lrs, trainer.lr_scheduler.lr_lambdas, strict=True)
    ]
    for group, rate in zip(groups, rates, strict=True):
        group["lr"] = rate
    trainer.lr_scheduler._last_lr = rates


def _agree(model: nn.Module) -> None:
    """Stop with an error that names the rank when processes ended up with different models."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return
    description = repr([(name, tuple(p.shape), p.requires_grad) for name, p in model.named_parameters()])
    digest = hashlib.sha256(description.encode()).hexdigest()
    digests: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(digests, digest)
    different = [rank for rank, other in enumerate(digests) if other != digests[0]]
    if different:
        raise RuntimeError(f"Processes disagree on the pruned structure: rank(s) {different} differ from rank 0.")
