"""What other libraries do not promise to keep, and this package relies on by name: one table, checked before it is
used.

A release that renames one of these would make a run fail late, or be wrong without a word: an override that is no
longer called, a mark that is no longer taken off. So :func:`check_names` looks for them when a trainer is made or a
model loads; for those of an engine only where a trainer uses it. Imports no module that is not loaded or about to be.
What is relied on by argument of a module of a model is read from the module instead (``calls``).
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from types import CodeType
from typing import Any, Literal, NamedTuple

from apt_trainer.errors import UserError
from apt_trainer.libraries.versions import DEEPSPEED, TESTED, check_versions, installed, tested_ranges

MODULE_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)
"""Where a module keeps its hooks."""

Use = Literal["loading", "method", "training", "fsdp2", "zero", "zero12", "zero3"]


class Name(NamedTuple):
    """``owner``: module, and class or function in it, that has all of ``names``: a class as attributes of itself or
    of its instances, a function as parameters or, where ``written``, as names that its code reads or writes.

    ``seen``: versions of the library that it was seen in, where that is not all that are tested.
    """

    owner: str
    names: tuple[str, ...]
    purpose: str
    written: bool = False
    seen: str = ""


_TRAINER = "transformers.trainer.Trainer"
_FSDP = "torch.distributed.fsdp._fully_shard"

NAMES: dict[Use, tuple[Name, ...]] = {
    "loading": (
        Name(
            "transformers.modeling_utils.PreTrainedModel",
            ("_from_config", "tie_weights", "set_attn_implementation", "config_class"),
            "build a model of the dense shape and fill it",
        ),
        Name(
            "transformers.configuration_utils.PreTrainedConfig",
            ("_attn_implementation", "attribute_map", "_name_or_path"),
            "give a pruned model the attention and the names of its stock config, and find the plan beside it",
        ),
        Name(
            "transformers.models.auto.auto_factory._BaseAutoModelClass",
            ("_model_mapping", "register"),
            "register pruned models with the Auto classes of their stock model",
        ),
        Name("torch.nn.modules.module.Module", ("_parameters", "_buffers"), "put parameters of other shapes in place"),
        Name("transformers.cache_utils.Cache", ("update", "get_seq_length"), "keep the slot of a removed attention"),
        Name(
            "transformers.cache_utils.EncoderDecoderCache",
            ("self_attention_cache", "cross_attention_cache"),
            "keep the slot of a removed attention",
        ),
    ),
    "method": (
        Name(
            "transformers.utils.output_capturing.maybe_install_capturing_hooks",
            ("_output_capturing_hooks_installed",),
            "give a teacher that is a copy its own hidden states",
            written=True,
        ),
        Name(
            "torch.nn.modules.module.Module",
            (*MODULE_HOOKS, "_is_full_backward_hook"),
            "copy the student without its hooks",
        ),
        Name("torch.nn.modules.module.Module", ("_compiled_call_impl",), "see that a model is compiled already"),
        Name("torch._subclasses.fake_tensor.FakeTensorMode", (), "count operations without computing"),
        Name(
            "peft.tuners.lora.layer.LoraLayer",
            ("_cast_input_dtype", "r", "lora_alpha", "scaling", "lora_A", "lora_B", "get_base_layer"),
            "grow and merge adapters",
        ),
        Name("peft.tuners.lora.layer.Linear", ("get_delta_weight",), "merge adapters"),
        Name("peft.tuners.tuners_utils.cast_adapter_dtype", ("model", "adapter_name"), "keep adapters in float32"),
    ),
    "training": (
        Name(
            _TRAINER,
            (
                "_prepare_inputs",
                "_get_collator_with_removed_columns",
                "_load_scaler",
                "compute_loss_context_manager",
                "get_optimizer_cls_and_kwargs",
                "callback_handler",
                "model_wrapped",
                "lr_scheduler",
                "is_deepspeed_enabled",
                "is_fsdp_enabled",
            ),
            "score, evaluate and rebuild a model inside the training loop",
        ),
        Name(_TRAINER, ("loss_is_scaled_for_ga",), "weigh micro-batches", seen="since 5.19"),
        Name(_TRAINER, ("model_accepts_loss_kwargs", "gather_function"), "count each row once in an evaluation"),
        Name(_TRAINER, ("_mixed_mesh_grads",), "look at gradients anew after a change of shape", seen="since 5.19"),
        Name(
            f"{_TRAINER}._prepare_for_training",
            ("max_steps", "train_dataloader", "resume_from_checkpoint"),
            "prune before training, and rebuild the engine after a change of shape",
        ),
        Name(f"{_TRAINER}._run_epoch", ("train_dataloader",), "end a run that was resumed at its end"),
        Name(
            f"{_TRAINER}._inner_training_loop",
            ("_prepare_for_training", "_run_epoch", "_finalize_training"),
            "take part in the training loop",
            written=True,
        ),
        Name(f"{_TRAINER}.train", ("resume_from_checkpoint",), "resume from the last whole checkpoint"),
        Name(f"{_TRAINER}.train", ("_load_from_checkpoint",), "resume a model that was cut", written=True),
        Name(f"{_TRAINER}._save_checkpoint", ("model", "trial"), "write whole checkpoints"),
        Name(
            f"{_TRAINER}._save_checkpoint",
            ("_get_output_dir", "save_model", "_save_optimizer_and_scheduler"),
            "write whole checkpoints",
            written=True,
        ),
        Name(f"{_TRAINER}._get_output_dir", ("trial",), "write whole checkpoints"),
        Name(f"{_TRAINER}._save_optimizer_and_scheduler", ("output_dir",), "write the optimizer without pickle"),
        Name(f"{_TRAINER}._load_from_checkpoint", ("resume_from_checkpoint", "model"), "resume a model that was cut"),
        Name(f"{_TRAINER}._determine_best_metric", ("metrics", "trial"), "choose the best within the budget"),
        Name(f"{_TRAINER}._finalize_training", ("_load_best_model",), "choose the best within the budget", True),
        Name(f"{_TRAINER}.training_step", ("model", "inputs", "num_items_in_batch"), "train the model of the moment"),
        Name(
            f"{_TRAINER}.compute_loss",
            ("model", "inputs", "return_outputs", "num_items_in_batch"),
            "add the loss of distillation",
        ),
        Name(f"{_TRAINER}.create_optimizer", ("model",), "give adapters a learning rate of their own"),
        Name(
            f"{_TRAINER}.get_batch_samples",
            ("epoch_iterator", "num_batches", "device"),
            "weigh micro-batches",
        ),
        Name(
            f"{_TRAINER}.evaluation_loop",
            ("dataloader", "description", "prediction_loss_only", "metric_key_prefix"),
            "count each row once in an evaluation",
        ),
        Name(f"{_TRAINER}.get_eval_dataloader", ("eval_dataset",), "keep one loader for each set of rows"),
        Name(f"{_TRAINER}._get_dataloader", ("is_training",), "leave no row out of an evaluation"),
        Name(f"{_TRAINER}._get_eval_sampler", ("eval_dataset",), "tell which row a prediction is of"),
        Name(f"{_TRAINER}.get_decay_parameter_names", ("model",), "decay what the dense model would"),
        Name(f"{_TRAINER}._hp_search_setup", ("trial",), "begin each trial with a model of its own"),
        Name(f"{_TRAINER}.init_hf_repo", ("token",), "make the repository before training"),
        Name(
            f"{_TRAINER}.push_to_hub",
            ("commit_message", "blocking", "token", "revision"),
            "upload the finished model, not the state of the run",
        ),
        Name(f"{_TRAINER}.create_model_card", (), "write the card of the finished model"),
        Name("torch._dynamo", ("reset",), "forget what was compiled for other shapes"),
        Name(f"{_TRAINER}.log", ("logs", "start_time"), "log sparsity and the parts of the loss"),
        Name(f"{_TRAINER}.save_model", ("output_dir", "_internal_call"), "write a checkpoint or the finished model"),
        Name(
            f"{_TRAINER}.prediction_step",
            ("model", "inputs", "prediction_loss_only"),
            "count each row once in an evaluation",
        ),
        Name(
            "transformers.trainer_utils.rotate_checkpoints",
            ("output_dir", "save_total_limit", "best_model_checkpoint", "use_mtime"),
            "remove old checkpoints once a new one is whole",
        ),
        Name(
            "accelerate.accelerator.Accelerator",
            ("_models", "_optimizers", "_schedulers", "deepspeed_engine_wrapped", "gradient_state"),
            "rebuild the engine after a change of shape",
        ),
        Name(
            "accelerate.accelerator.Accelerator.prepare_model",
            ("_original_forward",),
            "take mixed precision off the model",
            written=True,
        ),
        Name(
            "accelerate.accelerator.Accelerator.prepare",
            ("_is_accelerate_prepared",),
            "take the model out of accelerate",
            written=True,
        ),
        Name(
            "torch.distributed.distributed_c10d",
            ("_get_default_store",),
            "name the process that does not answer",
        ),
        Name(
            "torch.optim.lr_scheduler.LambdaLR",
            ("last_epoch", "_step_count", "_last_lr", "base_lrs", "lr_lambdas"),
            "put a schedule where it was",
        ),
    ),
    "zero": (
        Name(
            "deepspeed.runtime.engine.DeepSpeedEngine",
            (
                "module_forward_pre_hook",
                "module_forward_post_hook",
                "basic_optimizer",
                "client_optimizer",
                "seq_data_parallel_group",
                "param_names",
                "global_steps",
                "destroy",
            ),
            "take the model out of the engine",
        ),
        Name(
            "deepspeed.utils",
            (
                "safe_get_full_fp32_param",
                "safe_get_full_optimizer_state",
                "safe_set_full_fp32_param",
                "safe_set_full_optimizer_state",
            ),
            "carry the state of the optimizer",
        ),
        Name("torch.distributed.distributed_c10d._set_pg_timeout", ("timeout", "group"), "hold to ddp_timeout"),
    ),
    "zero12": (
        Name(
            "deepspeed.runtime.zero.stage_1_and_2.DeepSpeedZeroOptimizer",
            (
                "bit16_groups",
                "single_partition_of_fp32_groups",
                "_hp_optimizer_states_linked",
                "_lazy_init_hp_params_optimizer_state",
            ),
            "carry the state of the optimizer",
        ),
    ),
    "zero3": (
        Name(
            "deepspeed.runtime.zero.stage3.DeepSpeedZeroOptimizer_Stage3",
            (
                "_DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition",
                "fp16_groups",
                "fp16_partitioned_groups",
                "fp16_partitioned_groups_flat",
                "fp32_partitioned_groups_flat",
                "grad_partitions_flat_buffer",
                "ipg_buckets",
                "lp_param_buffer",
                "parameter_offload",
            ),
            "carry the state of the optimizer and give memory back",
        ),
        Name(
            "deepspeed.utils",
            (
                "safe_get_local_fp32_param",
                "safe_get_local_optimizer_state",
                "safe_set_local_fp32_param",
                "safe_set_local_optimizer_state",
            ),
            "carry the state of the optimizer",
        ),
        Name(
            "deepspeed.runtime.zero.parameter_offload",
            ("FWD_MODULE_STACK", "ZeROOrderedDict"),
            "take the hooks of the engine off the model",
        ),
        Name(
            "deepspeed.runtime.zero.parameter_offload.DeepSpeedZeRoOffload",
            ("get_param_coordinator", "param_coordinator", "destroy"),
            "let go of what was gathered",
        ),
        Name(
            "deepspeed.runtime.zero.partitioned_param_coordinator.PartitionedParameterCoordinator",
            (
                "_clean_inflight_param_registry",
                "release_and_reset_all",
                "_PartitionedParameterCoordinator__params_to_release",
            ),
            "let go of what was gathered",
        ),
        Name(
            "deepspeed.runtime.zero.partition_parameters.InsertPostInitMethodToModuleSubClasses",
            ("linear_bk",),
            "give torch its own linear back",
        ),
        Name(
            "deepspeed.runtime.zero.partition_parameters.Init._convert_to_deepspeed_param",
            ("ds_id", "ds_shape", "ds_numel", "ds_status", "ds_tensor", "all_gather", "partition")
            + ("convert_to_zero_parameters",),
            "cut what is partitioned",
            written=True,
        ),
    ),
    "fsdp2": (
        Name(
            f"{_FSDP}._fsdp_state.FSDPState",
            ("_pre_forward_hook_handle", "_post_forward_hook_handle", "_fsdp_param_groups"),
            "take FSDP2 off a model",
            seen="torch since 2.12",
        ),
        Name(
            f"{_FSDP}._fsdp_param_group.FSDPParamGroup",
            (
                "fsdp_params",
                "_module_to_pre_save_state_dict_hook_handle",
                "_module_to_pre_load_state_dict_hook_handle",
            ),
            "take FSDP2 off a model",
        ),
        Name(f"{_FSDP}._fsdp_param.FSDPParam", ("_post_load_hook_handle",), "take FSDP2 off a model"),
        Name(
            f"{_FSDP}._fully_shard.fully_shard",
            ("_is_fsdp_managed_module", "_fsdp_use_orig_params"),
            "take FSDP2 off a model",
            written=True,
        ),
        Name("torch.distributed._composable_state", ("_module_state_mapping",), "take FSDP2 off a model"),
        Name("torch.distributed._composable.contract", ("REGISTRY_KEY", "STATE_KEY"), "take FSDP2 off a model"),
        Name("accelerate.utils.modeling.get_mixed_precision_context_manager", ("native_amp",), "autocast"),
    ),
}


def check_names(*uses: Use) -> None:
    """Raise one :class:`UserError` where a version of a library is not one that can be used, or where one lacks names
    that ``uses`` need."""
    of_deepspeed = any(use.startswith("zero") for use in uses)
    check_versions(TESTED | DEEPSPEED if of_deepspeed else TESTED)
    lacking = [text for use in uses for text in missing(use)]
    if not lacking:
        return
    packages = sorted({text.split(".")[0] for text in lacking})
    ranges = {package: (TESTED | DEEPSPEED)[package] for package in packages}
    found = ", ".join(f"{package} {installed(package)}" for package in packages)
    raise UserError(
        f"{found} cannot be used: {'; '.join(lacking)}. apt_trainer is tested with {tested_ranges(ranges)}; install "
        "one of those versions."
    )


@cache
def missing(use: Use) -> tuple[str, ...]:
    """What of the table the installed libraries do not have for ``use``, and what it is needed for."""
    lacking = []
    for entry in NAMES[use]:
        names = [name for name in entry.names if not _has(entry, name)]
        if names or not _found(entry.owner):
            what = f"{entry.owner} with {', '.join(names)}" if names else entry.owner
            lacking.append(f"{what} is gone, which is needed to {entry.purpose}")
    return tuple(lacking)


def _has(entry: Name, name: str) -> bool:
    owner = _found(entry.owner)
    if owner is None:
        return False
    if inspect.isclass(owner):
        return hasattr(owner, name) or any(name in _mentioned(code) for code in _methods(owner))
    if inspect.ismodule(owner):
        return hasattr(owner, name)
    function = inspect.unwrap(owner)
    return name in (_mentioned(function.__code__) if entry.written else inspect.signature(function).parameters)


def _found(path: str) -> Any:
    """What ``path`` names: a module, or what is in one; None where there is no such thing."""
    parts = path.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found: Any = import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for name in parts[length:]:
            found = getattr(found, name, None)
        return found
    return None


def _methods(owner: type) -> Iterator[CodeType]:
    """Code of all functions in ``owner`` and its bases, which say what attributes an instance has."""
    for one in owner.__mro__:
        for value in vars(one).values():
            code = getattr(inspect.unwrap(value), "__code__", None) if callable(value) else None
            if code is not None:
                yield code


def _mentioned(code: CodeType) -> set[str]:
    """Names of attributes and variables, and short texts, in ``code`` and the functions within it."""
    found = set(code.co_names) | set(code.co_varnames)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            found |= _mentioned(constant)
        elif isinstance(constant, str):
            found.add(constant)
    return found
