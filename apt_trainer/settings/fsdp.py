"""What can be told about FSDP before a model loads: launches and settings under which it cannot work.

Settings come from ``fsdp_config`` of the training arguments or, through environment variables, from the launcher. Not
for the training loop.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from accelerate.utils import DistributedType

from apt_trainer.errors import UserError

_TRUE = ("true", "1")
_OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "sgd")


def wants_fsdp(args: Any) -> bool:
    """Whether training arguments, or the launcher, ask for FSDP."""
    return bool(args.fsdp) or _variable("ACCELERATE_USE_FSDP") in _TRUE


def uses_cpu(args: Any) -> bool:
    """Whether training arguments, or the launcher, ask for CPUs."""
    return bool(args.use_cpu) or _variable("ACCELERATE_USE_CPU") in _TRUE


def check_fsdp_launch(args: Any) -> None:
    """Must come before the processes join.

    Raises:
        UserError: where there is neither an accelerator nor a wish for CPUs, or no launcher.
    """
    if not torch.accelerator.is_available() and not uses_cpu(args):
        raise UserError(
            "FSDP is asked for, but this machine has no accelerator. To try it out on CPUs, set use_cpu: true or take "
            "--accelerate_config fsdp2_cpu."
        )
    if "RANK" not in os.environ:
        raise UserError(
            "FSDP needs a launcher, also for one process: apt-trainer train --accelerate_config fsdp2, "
            "accelerate launch, or torchrun."
        )


def check_fsdp(args: Any) -> None:
    """Refuse what does not work under FSDP, and on CPUs have accelerate switch it on; ``args`` are complete.

    Raises:
        UserError: naming the setting.
    """
    if not wants_fsdp(args):
        return
    _check_settings(args)
    _check_training(args)
    _switch_on_for_cpus(args.distributed_state)


def _switch_on_for_cpus(state: Any) -> None:
    """accelerate has a list of the kinds of processes that it switches FSDP on for, without CPUs, which it leaves to
    DDP and says nothing. Processes of a kind on that list they are until it has made FSDP of that, moments later.

    Experimental. Should accelerate change, ``runtime.check_options`` finds FSDP switched off.
    """
    if state.distributed_type == DistributedType.MULTI_CPU:
        state.distributed_type = DistributedType.MULTI_GPU


def _check_settings(args: Any) -> None:
    if _setting(args, "fsdp_version", "FSDP_VERSION") != "2":
        raise UserError("Shapes cannot change under FSDP1. Set fsdp_version: 2, as the profile fsdp2 does.")
    for name, variable, instead in (
        ("cpu_offload", "FSDP_OFFLOAD_PARAMS", "Use --accelerate_config zero3_offload for offload"),
        ("activation_checkpointing", "FSDP_ACTIVATION_CHECKPOINTING", "Set activation_checkpointing in the recipe"),
        ("cpu_ram_efficient_loading", "FSDP_CPU_RAM_EFFICIENT_LOADING", "Set it to false, as the profile fsdp2 does"),
    ):
        if _setting(args, name, variable) in _TRUE:
            raise UserError(f"Shapes cannot change under FSDP with {name} of its own. {instead}.")
    if _setting(args, "ignored_modules", "FSDP_IGNORED_MODULES"):
        raise UserError("Shapes cannot change under FSDP with ignored_modules. Remove the setting.")
    if args.parallelism_config is not None or _variable("ACCELERATE_USE_PARALLELISM_CONFIG") in _TRUE:
        raise UserError("Shapes cannot change under FSDP with a parallelism_config. Remove it: all processes split.")


def _check_training(args: Any) -> None:
    if args.deepspeed_plugin is not None:
        raise UserError("FSDP and DeepSpeed are both asked for. Choose one of them.")
    if args.fp16:
        raise UserError("fp16 under FSDP is not supported. Use bf16: true.")
    if args.torch_compile:
        raise UserError("torch_compile under FSDP is not supported. Remove it.")
    if args.dense_baseline:
        raise UserError(
            "dense_baseline starts a process of its own, which would join those of FSDP. Train the dense model alone."
        )
    if args.save_only_model and args.load_best_model_at_end:
        raise UserError("transformers does not combine save_only_model with load_best_model_at_end under FSDP.")
    optimizer = str(getattr(args.optim, "value", args.optim))
    if optimizer not in _OPTIMIZERS:
        raise UserError(f"optim: {optimizer} is not supported under FSDP. Use one of {', '.join(_OPTIMIZERS)}.")
    if args.uses_adapters and args.details.rank_score == "absolute":
        raise UserError(
            "preset: paper scores adapters by gradients, of which FSDP keeps a part on each process. Use preset: ours."
        )


def _setting(args: Any, name: str, variable: str) -> str:
    """One setting of FSDP in lower case; empty where nothing says."""
    if not args.fsdp:
        return _variable(variable)
    given = args.fsdp_plugin_args or {}  # None for other back ends than torch's
    return str(given[name]).lower() if name in given else _variable(variable)


def _variable(name: str) -> str:
    return os.environ.get(name, "").lower()
