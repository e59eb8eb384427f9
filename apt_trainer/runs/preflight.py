"""What would stop a run, found before weights load and before anything is written; for ``train`` and the dry run.

Each check raises one :class:`UserError`. Not for single settings (``settings``, ``config``) or rows (``tasks``).
"""

from __future__ import annotations

import copy
import json
import os
from dataclasses import fields
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from transformers.integrations.hub_kernels import is_kernel
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from apt_trainer.errors import UserError, reason, unknown_choice
from apt_trainer.evaluate.harness import check_tasks, not_a_language_model
from apt_trainer.libraries.private_names import check_names
from apt_trainer.plan.schedule import make_schedule
from apt_trainer.pruning.pruner import AdaptivePruner
from apt_trainer.runs.exports import check_exports
from apt_trainer.settings import DataSettings, MethodSettings, ModelSettings
from apt_trainer.settings.config import APTConfig
from apt_trainer.settings.engines import check_launch
from apt_trainer.settings.packages import check_packages
from apt_trainer.settings.presets import with_presets
from apt_trainer.settings.recipe import Recipe
from apt_trainer.store.events import METRICS_FILE, RECIPE_FILE
from apt_trainer.store.export import parse_format
from apt_trainer.store.hub import check_upload
from apt_trainer.store.pretrained import build_model, check_teacher, max_positions
from apt_trainer.tasks import TaskData
from apt_trainer.training.checkpoints.best import check_candidates
from apt_trainer.training.checkpoints.state import check_complete
from apt_trainer.training.checkpoints.whole import GOES_ON, checkpoints_in, find_whole, last_whole
from apt_trainer.training.compiled import compile_options
from apt_trainer.training.engines.optimizer_class import check_optimizer
from apt_trainer.training.inside import check_embeddings
from apt_trainer.training.rehearsal import check_output, rehearse

_LANGUAGE_MODELS = ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM")
_OF_THE_LOOP = ("max_steps", "num_train_epochs", "seed", "learning_rate", "lr_scheduler_type", "warmup_steps")
_FREE = ("calibration_batch_size", "trust_remote_code", "attn_implementation")


def check_before_loading(recipe: Recipe, config: Any, data: TaskData, tokenizer: Any) -> None:
    """Raise :class:`UserError` for a schedule, budget, length, task, teacher or save that cannot work, on the meta
    device.

    A latency budget is measured, so it is checked only once the model is there.
    """
    check_names("training")
    args = recipe.training
    check_launch(args)
    check_optimizer(args)
    for name in ("prediction_loss_only", "batch_eval_metrics"):
        if getattr(args, name):
            raise UserError(f"{name}: true leaves the metric of the task out, which a run ends with. Remove it.")
    if not args.eval_do_concat_batches:
        raise UserError("eval_do_concat_batches: false gives metrics of the task no rows to count. Remove it.")
    check_upload(args)
    compile_options(args)
    check_attention(recipe.model.attn_implementation, args.device.type)
    if args.dense_baseline and "RANK" in os.environ:
        raise UserError(
            "dense_baseline starts a process of its own, which would join those of the launcher. Train the dense "
            "model alone (target_sparsity: null, tune: full), or start without a launcher."
        )
    if args.dense_baseline and getattr(config, "apt_structure", None) is not None:
        raise UserError(
            "dense_baseline compares with the dense model that model_name_or_path names, but that one is pruned. Set "
            "dense_baseline: false; train its dense original in a run of its own (target_sparsity: null, tune: full)."
        )
    if args.heldout_rows(len(data.train)) >= len(data.train):
        raise UserError(
            f"The training data have {len(data.train)} row, all of it held out to choose the teacher on. Give more "
            "rows, or set distillation: none."
        )
    steps = args.total_steps(len(data.train) - args.heldout_rows(len(data.train)))
    check_candidates(args, make_schedule(args, steps))
    _check_lengths(config, data, args)
    if args.lm_eval_tasks:
        if data.model_class not in _LANGUAGE_MODELS:
            raise not_a_language_model(f"A model for {recipe.data.task}")
        check_tasks(args.lm_eval_tasks)
    settings = copy.copy(args)
    if settings.sparsity_metric == "latency":
        settings.sparsity_metric = "params"
    model = build_model(config, data, "meta", recipe.model.dtype)
    if args.teacher_name_or_path is not None:
        teacher = check_teacher(recipe.model.of(args.teacher_name_or_path), data, model, tokenizer)
        check_embeddings(model, teacher, args)
    _check_images(model, data)
    check_exports(args, model, tokenizer)
    rehearse(model, Path(str(args.output_dir)), AdaptivePruner(model, settings), tokenizer)


def check_installed(recipe: Recipe) -> None:
    """Raise :class:`UserError` where a setting needs a package that is not installed, or names no known one."""
    trackers = recipe.training.report_to
    for name in [trackers] if isinstance(trackers, str) else trackers:
        if name not in (*INTEGRATION_TO_CALLBACK, "none", "all"):
            raise unknown_choice("report_to", name, [*INTEGRATION_TO_CALLBACK, "none", "all"])
    for name in recipe.training.export:
        parse_format(name)
    check_packages({**vars(recipe.model), **vars(recipe.data), **vars(recipe.training)})


def check_attention(name: str | None, device: str | None = None) -> None:
    """Raise :class:`UserError` for an attention that transformers does not know by ``name``, or that cannot train on
    this kind of ``device``; None: its own choice.

    Whether this machine and this model can use it shows when the model is built.
    """
    if name == "flex_attention" and device == "cpu":
        raise UserError(
            "attn_implementation='flex_attention' has no gradients on a CPU. Set attn_implementation: sdpa; the "
            "finished model may be loaded with it."
        )
    known = ["eager", *ALL_ATTENTION_FUNCTIONS.valid_keys()]
    if name is not None and name.removeprefix("paged|") not in known and not is_kernel(name):
        raise unknown_choice("attn_implementation", name, [*known, "OWNER/KERNEL of the hub"])


def _check_images(model: PreTrainedModel, data: TaskData) -> None:
    """Raise :class:`UserError` where the image processor makes images of a size that ``model`` does not take."""
    if model.main_input_name != "pixel_values":
        return
    pixels = data.collator([data.train[0]])["pixel_values"]
    try:
        model(pixel_values=pixels.to("meta", model.dtype))
    except (RuntimeError, ValueError) as error:  # another number of pixels or of colours
        raise UserError(
            f"The image processor makes images of {' × '.join(map(str, pixels.shape[1:]))} (channels, height, width), "
            f"which {type(model).__name__} does not take ({reason(error)}). Give the image processor of the model."
        ) from error


def _check_lengths(config: Any, data: TaskData, args: APTConfig) -> None:
    """Texts that speed or costs are taken at have to fit the model."""
    longest = max_positions(config)
    if longest is None:
        return
    asked = {}
    if args.measure_latency:
        generated = args.latency_new_tokens if data.model_class == "AutoModelForCausalLM" else 0
        asked["latency_length"] = args.latency_length + generated
    weighs_by_length = args.importance == "nri" and args.nri_cost in ("latency", "memory")
    if args.prunes and (args.sparsity_metric not in ("params", "total_params") or weighs_by_length):
        asked["reference_length"] = args.reference_length
    for name, length in asked.items():
        if length > longest:
            new = f" with latency_new_tokens={args.latency_new_tokens}" if length > getattr(args, name) else ""
            raise UserError(
                f"{name}={getattr(args, name)}{new} is more than the {longest} positions of the model. Lower {name}."
            )


def checkpoint_to_resume(recipe: Recipe) -> str | None:
    """Path of the checkpoint to go on from; None for a new run.

    With ``resume_from_checkpoint: true`` it is the last one that is whole: those that are not are named in the log and
    passed over. ``auto`` is that too, and a new run where there is none, so that one command can be started again and
    again. Raises :class:`UserError` rather than write over an older run, or go on with other settings.
    """
    output, asked = Path(str(recipe.training.output_dir)), recipe.training.resume_from_checkpoint
    check_output(output)
    if asked in (None, False, "false", "False"):
        _refuse_an_older_run(output)
        return None
    if asked == "auto":
        if (output / METRICS_FILE).exists():
            raise UserError(f"{output} holds a finished run. Choose another output_dir, or remove it.")
        whole = find_whole(output)
        if whole is None:
            if checkpoints_in(output):
                _check_same_run(output / RECIPE_FILE, recipe)
            return None
        found = whole
    else:
        found = last_whole(output) if asked in (True, "true", "True") else Path(str(asked))
        check_complete(found)
    _check_same_run(found.parent / RECIPE_FILE, recipe)
    return str(found)


def finished_run(recipe: Recipe) -> dict[str, Any] | None:
    """The metrics of this very run where it has finished and ``resume_from_checkpoint`` is ``auto``: nothing is
    left to do. Raises :class:`UserError` where the finished run had other settings."""
    output = Path(str(recipe.training.output_dir))
    if recipe.training.resume_from_checkpoint != "auto" or not (output / METRICS_FILE).is_file():
        return None
    _check_same_run(output / RECIPE_FILE, recipe)
    metrics: dict[str, Any] = json.loads((output / METRICS_FILE).read_text(encoding="utf-8"))
    return metrics


def _refuse_an_older_run(output: Path) -> None:
    """A run that was ended before its first checkpoint has left nothing to lose: it is begun anew."""
    written = [name for name in (METRICS_FILE, "config.json") if (output / name).exists()]
    found = checkpoints_in(output)
    if written or found:
        go_on = f", or set {GOES_ON}" if found and METRICS_FILE not in written else ""
        raise UserError(
            f"output_dir={str(output)!r} already holds a run ({', '.join(written) or 'checkpoints'}). "
            f"Choose another output_dir, or remove it{go_on}."
        )


def _check_same_run(file: Path, recipe: Recipe) -> None:
    """Raise :class:`UserError` where the recipe a checkpoint was made with says something else about model, data or
    method. Machines, batches per process, saving, logging and measuring may change."""
    if not file.is_file():
        return
    try:
        before = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file} is damaged ({error}). Remove it to resume without comparing settings.") from error
    groups = (ModelSettings, DataSettings, MethodSettings)
    names = [f.name for group in groups for f in fields(group) if f.name not in _FREE] + list(_OF_THE_LOOP)
    before, absent = with_presets(str(file), before, warn=False), object()
    other = [name for name in names if before.get(name, absent) != recipe.given.get(name, absent)]
    if other:
        values = ", ".join(f"{name} was {before.get(name)!r}, is {recipe.given.get(name)!r}" for name in other)
        raise UserError(
            f"resume_from_checkpoint goes on with a run of other settings: {values}. Give those of {file}, or start "
            "anew in another output_dir."
        )
