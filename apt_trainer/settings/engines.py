"""What can be told about an engine before a model loads: settings that cannot work under it, and its peculiarities.

Not for the training loop.
"""

from __future__ import annotations

import os
from datetime import timedelta
from importlib.util import find_spec
from typing import Any

from accelerate import PartialState
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from apt_trainer.errors import UserError
from apt_trainer.settings.fsdp import check_fsdp_launch, uses_cpu, wants_fsdp

_OFF_IN_STAGE_3 = {
    "zero_hpz_partition_size": 1,
    "mics_shard_size": -1,
    "zero_quantized_weights": False,
    "zero_quantized_gradients": False,
}
"""What cannot be used, and its value when it is not."""


def wants_deepspeed(args: Any) -> bool:
    """Whether training arguments, or the launcher, ask for DeepSpeed."""
    return bool(args.deepspeed) or os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() in ("true", "1")


def check_launch(args: Any) -> None:
    """Raise :class:`UserError` where one process has several devices, which the Trainer would share out among threads
    (``DataParallel``); ``args`` are complete."""
    if args.n_gpu > 1:
        raise UserError(
            f"This process sees {args.n_gpu} GPUs and would share them out by DataParallel, whose copies do not "
            f"follow a change of shape. Start a process for each: apt-trainer train --accelerate_config ddp …, or "
            f"torchrun --nproc_per_node {args.n_gpu} YOUR_SCRIPT.py; or set CUDA_VISIBLE_DEVICES=0 to use one."
        )


def before_processes_join(args: Any) -> None:
    """Must come before ``TrainingArguments.__post_init__``, which joins the processes.

    Raises:
        UserError: where DeepSpeed is wanted but missing, or FSDP is wanted and cannot be had.
    """
    if wants_fsdp(args):
        _check_base(args, "FSDP2")
        check_fsdp_launch(args)
    if not wants_deepspeed(args):
        return
    if find_spec("deepspeed") is None:
        raise UserError("DeepSpeed is asked for but not installed. Install it: pip install 'apt-trainer[deepspeed]'.")
    if uses_cpu(args):
        # Told so by its variable, accelerate would leave DeepSpeed out and say nothing; by the argument, it does not.
        args.use_cpu = True
        os.environ.pop("ACCELERATE_USE_CPU", None)
        _on_cpu()


def join_processes(args: Any) -> None:
    """Join processes on CPUs here, for transformers leaves ``ddp_timeout`` out there: a process that hangs would be
    waited for half an hour whatever it says."""
    if uses_cpu(args) and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        PartialState(cpu=True, backend=args.ddp_backend, timeout=timedelta(seconds=args.ddp_timeout))


def check_deepspeed(args: Any) -> None:
    """Refuse what does not work under DeepSpeed; ``args`` are complete.

    Raises:
        UserError: naming the setting.
    """
    plugin = args.deepspeed_plugin
    if plugin is None:
        return
    if plugin.zero_stage not in (1, 2, 3):
        raise UserError(
            f"Shapes cannot change under DeepSpeed with ZeRO stage {plugin.zero_stage}. Use stage 1, 2 or 3, or DDP."
        )
    if plugin.zero_stage == 3:
        _check_stage_3(plugin.deepspeed_config["zero_optimization"])
        _check_base(args, "ZeRO-3")
    if args.use_cpu:  # else, with offload, DeepSpeed would compile an Adam of its own, for minutes
        plugin.deepspeed_config.setdefault("zero_force_ds_cpu_optimizer", False)
    for section in ("optimizer", "scheduler"):
        if section in plugin.deepspeed_config:
            raise UserError(
                f"The DeepSpeed config has a section {section!r}, but adapters and base weights have learning rates "
                "of their own. Remove the section and use optim and lr_scheduler_type."
            )
    if args.fp16:
        raise UserError("fp16 under DeepSpeed would lose its loss scale at each change of shape. Use bf16: true.")
    if args.uses_adapters and args.details.rank_score == "absolute":
        raise UserError(
            "preset: paper scores adapters by gradients, which DeepSpeed has cleared by then. Use preset: ours."
        )
    if args.save_only_model and args.load_best_model_at_end:
        raise UserError(
            "transformers does not combine save_only_model with load_best_model_at_end under DeepSpeed. "
            "Remove save_only_model, or train under DDP."
        )
    if "RANK" not in os.environ:
        raise UserError(
            "DeepSpeed needs a launcher, also for one process: apt-trainer train --accelerate_config zero2, "
            "accelerate launch, or torchrun."
        )


def _check_base(args: Any, engine: str) -> None:
    """Raise :class:`UserError` for quantised weights under an ``engine`` that splits each weight among processes."""
    if args.base_quantization is not None:
        raise UserError(
            f"base_quantization: {args.base_quantization} does not go with {engine}, which splits ordinary weights "
            "only. Use DDP or ZeRO-2, where each process holds the quantised base, or leave base_quantization out."
        )


def _check_stage_3(settings: dict[str, Any]) -> None:
    used = [name for name, off in _OFF_IN_STAGE_3.items() if settings.get(name, off) != off]
    used += [name for name in ("offload_param", "offload_optimizer") if _device(settings.get(name)) == "nvme"]
    if used:
        raise UserError(
            f"Shapes cannot change under ZeRO-3 with {', '.join(used)}. Remove it; offload to the CPU is possible."
        )
    # Or models that are loaded from now on would be partitioned, where they are to be taken apart as a whole first.
    unset_hf_deepspeed_config()


def _device(offload: Any) -> Any:
    return offload.get("device") if isinstance(offload, dict) else None


def _on_cpu() -> None:
    if os.environ.setdefault("DS_ACCELERATOR", "cpu") != "cpu":
        raise UserError(f"use_cpu is set, but DS_ACCELERATOR is {os.environ['DS_ACCELERATOR']!r}. Set it to cpu.")
    import deepspeed.ops

    # Would compile C++ for a minute at the first start; gloo alone does.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
