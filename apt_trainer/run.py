"""One run from a recipe to a folder: data, model, training, evaluation, measurement, records.

Everything that ``apt-trainer train``, ``evaluate`` and ``benchmark`` do, without the command line. Not for the method
itself (``trainer``, ``pruner``).
"""

from __future__ import annotations

import copy
import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, set_seed
from transformers.trainer_utils import get_last_checkpoint

from apt_trainer.config import APTConfig
from apt_trainer.errors import UserError
from apt_trainer.measure import (
    PeakMemory,
    compare_latency,
    count_flops,
    count_parameters,
    example_inputs,
    return_freed_memory,
    size_on_disk,
)
from apt_trainer.models import family_of
from apt_trainer.pruned_model import load_pruned
from apt_trainer.pruner import AdaptivePruner
from apt_trainer.recipe import Recipe, load_recipe
from apt_trainer.report.events import read_events, write_json
from apt_trainer.report.plots import plot_run
from apt_trainer.schedule import make_schedule
from apt_trainer.settings import ModelSettings, resolve_path
from apt_trainer.tasks import TaskData, architecture_of, keeps_sequences_apart, load_task
from apt_trainer.tasks.trainer_options import data_options, set_task_arguments
from apt_trainer.trainer import EVENTS_FILE, APTTrainer, plain_trainer

METRICS_FILE = "metrics.json"
RECIPE_FILE = "recipe.json"
PLOT_FILE = "run.png"
_COMPARED = ("task_metric", "train_seconds", "peak_memory_bytes")
_DENSE = {
    "target_sparsity": None,
    "distillation": "none",
    "tune": "full",
    "tune_after_pruning": None,
    "tune_after_distillation": None,
    "tune_embeddings": True,
    "full_learning_rate": None,
    "measure_latency": False,
    "dense_baseline": False,
    "report_to": "none",
}
_VERSIONS = ("apt_trainer", "torch", "transformers", "peft", "accelerate", "deepspeed", "datasets")


def train(recipe: Recipe) -> dict[str, Any]:
    """Train, prune, evaluate, save and measure; returns what ``metrics.json`` holds.

    Raises :class:`UserError` before weights load or anything is written when the recipe cannot work.
    """
    args = recipe.training
    output = Path(str(args.output_dir))
    return_freed_memory()
    resume_from = _checkpoint_to_resume(output, args.resume_from_checkpoint)
    memory = PeakMemory(args.device.type)
    set_seed(args.seed)
    tokenizer, config, data = load_inputs(recipe.model, recipe)
    family_of(config)
    set_task_arguments(args, data, recipe.given)
    check_before_loading(config, data, args)
    dense = _train_dense(recipe, output) if args.dense_baseline and args.should_save else {}
    teacher = load_model(recipe.model, data, args.teacher_name_or_path) if args.teacher_name_or_path else None
    model = load_model(recipe.model, data)
    if data.packed and not keeps_sequences_apart(model):
        raise UserError(
            f"packing: true, but in {type(model).__name__} packed sequences would see each other. Set packing: false."
        )
    dense_parameters = count_parameters(model)
    trainer = APTTrainer(
        model,
        args,
        data.train,
        teacher=teacher,
        eval_dataset=data.validation,
        processing_class=tokenizer,
        **data_options(data, "validation"),
    )
    if trainer.is_world_process_zero():
        output.mkdir(parents=True, exist_ok=True)
        write_json(output / RECIPE_FILE, recipe.given)
    started, cpu_started = time.perf_counter(), time.process_time()
    result = trainer.train(resume_from_checkpoint=resume_from)
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
    peak = memory.above_start()
    trainer.compute_metrics = data.metrics["test"]
    scores = trainer.evaluate(data.test, metric_key_prefix=data.test_name)
    trainer.save_model(str(output))
    metrics = {
        "metric_name": data.metric_name,
        "task_metric": scores[f"{data.test_name}_{data.metric_name}"],
        "greater_is_better": data.greater_is_better,
        "evaluated_on": data.test_name,
        "scores": {name: value for name, value in scores.items() if isinstance(value, float)},
        "block_params_dense": int(trainer.pruner.block_cost.total(trainer.pruner.dense_plan.counts)),
        "block_params": int(trainer.pruner.block_cost.total(trainer.pruner.plan.counts)),
        "sparsity": trainer.pruner.sparsity(),
        "total_params_dense": dense_parameters,
        "total_params": count_parameters(trainer.model),
        "disk_bytes_dense": sum(p.numel() * p.element_size() for p in dense_copy(trainer.model).parameters()),
        "disk_bytes": size_on_disk(output),
        "train_seconds": seconds,
        "train_cpu_seconds": cpu_seconds,
        "train_steps": trainer.state.global_step,
        "train_loss": result.training_loss,
        "peak_memory_bytes": peak,
        "data_fingerprint": data.fingerprint,
        "seed": args.seed,
        "threads": torch.get_num_threads(),
        "device": str(args.device),
        "versions": versions(),
    }
    metrics |= {f"{name}_dense": dense[name] for name in _COMPARED if name in dense}
    if args.measure_latency and trainer.is_world_process_zero():
        metrics |= measure_speed(trainer.model, args.latency_batch_sizes, args.latency_length)
    if trainer.is_world_process_zero():
        _write_records(output, metrics, trainer, data)
    return metrics


def _train_dense(recipe: Recipe, output: Path) -> dict[str, Any]:
    """Metrics of full fine-tuning with the same data and steps, run (or found finished) in ``output``/dense."""
    folder = output / "dense"
    if not (folder / METRICS_FILE).is_file():
        given = (
            recipe.given | _DENSE | {"output_dir": str(folder), "learning_rate": recipe.training.dense_learning_rate}
        )
        with tempfile.TemporaryDirectory() as scratch:
            file = Path(scratch) / RECIPE_FILE
            write_json(file, given)
            command = [sys.executable, "-m", "apt_trainer", "train", "--config", str(file)]
            if subprocess.run(command, check=False, stdout=subprocess.DEVNULL).returncode != 0:
                raise UserError(
                    "Fine-tuning the dense model failed, see above. Set dense_baseline: false to do without."
                )
    metrics: dict[str, Any] = json.loads((folder / METRICS_FILE).read_text())
    return metrics


def evaluate(path: str, recipe: Recipe | None = None) -> dict[str, float]:
    """Metrics of the model saved in ``path`` on the test data of ``recipe``, or of the recipe it was trained with."""
    recipe = recipe or recipe_of(Path(path))
    settings = ModelSettings(model_name_or_path=path, dtype=recipe.model.dtype)
    tokenizer, _, data = load_inputs(settings, recipe)
    args = copy.copy(recipe.training)
    args.report_to = []
    set_task_arguments(args, data, recipe.given)
    model = load_saved(path, data)
    trainer = plain_trainer(
        model,
        args,
        eval_dataset=data.test,
        processing_class=tokenizer,
        **data_options(data, "test"),
    )
    scores = trainer.evaluate(metric_key_prefix=data.test_name)
    return {name: value for name, value in scores.items() if isinstance(value, float)}


def benchmark(
    path: str, baseline: str | None = None, batch_sizes: Sequence[int] = (1, 32), length: int = 128
) -> dict[str, Any]:
    """Sizes, FLOPs and latency of the model in ``path`` beside ``baseline`` (default: its own dense shape)."""
    model = load_saved(path)
    dense = dense_copy(model) if baseline is None else load_saved(resolve_path(baseline))
    return {
        "metric_name": "",
        "total_params_dense": count_parameters(dense),
        "total_params": count_parameters(model),
        "block_params_dense": _block_parameters(dense),
        "block_params": _block_parameters(model),
        "disk_bytes_dense": sum(p.numel() * p.element_size() for p in dense.parameters()),
        "disk_bytes": size_on_disk(Path(path)),
        **measure_speed(model, batch_sizes, length, dense),
    }


def measure_speed(
    model: PreTrainedModel, batch_sizes: Sequence[int], length: int, dense: PreTrainedModel | None = None
) -> dict[str, Any]:
    """Latency and forward FLOPs of ``model`` and of its dense shape, measured interleaved in this process."""
    dense = (dense or dense_copy(model)).to(model.device)
    timed = compare_latency({"dense": dense, "pruned": model}, list(batch_sizes), length)
    inputs = example_inputs(model, 1, length)
    return {
        "latency_length": length,
        "latency_ms": {
            name: {str(batch): {"median_ms": t.median_ms, "iqr_ms": t.iqr_ms} for batch, t in of_model.items()}
            for name, of_model in timed.items()
        },
        "flops_dense": count_flops(dense, inputs),
        "flops": count_flops(model, inputs),
    }


def dense_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A model of the stock class and size that ``model`` was cut from, with random weights: for sizes and speed."""
    config = model.config
    architecture = getattr(config, "apt_base_architecture", None)
    cls = type(model) if architecture is None else getattr(transformers, architecture)
    values = config.to_dict()
    values.pop("model_type", None)
    stock = cls.config_class(**{k: v for k, v in values.items() if not k.startswith("apt_")})
    stock._attn_implementation = config._attn_implementation
    return cls(stock).to(model.dtype)  # type: ignore[no-any-return]


def load_inputs(model: ModelSettings, recipe: Recipe) -> tuple[Any, Any, TaskData]:
    """(tokenizer, config, data) of ``model`` on the data of ``recipe``; reads no weights."""
    args = recipe.training
    tokenizer, config = load_tokenizer(model), load_config(model)
    seed = args.seed if args.data_seed is None else args.data_seed
    data = load_task(
        recipe.data,
        tokenizer,
        seed,
        max_positions=max_positions(config),
        architecture=architecture_of(config),
    )
    return tokenizer, config, data


def load_tokenizer(settings: ModelSettings) -> Any:
    path = settings.tokenizer_name_or_path or settings.model_name_or_path
    if path is None:
        raise UserError("model_name_or_path is missing. Give a hub name, a local folder or package:NAME/folder.")
    options = {"revision": settings.model_revision, "trust_remote_code": settings.trust_remote_code}
    return _from_hub(AutoTokenizer.from_pretrained, path, **options)


def load_config(settings: ModelSettings) -> Any:
    assert settings.model_name_or_path is not None
    options = {"revision": settings.model_revision, "trust_remote_code": settings.trust_remote_code}
    return _from_hub(AutoConfig.from_pretrained, settings.model_name_or_path, **options)


def build_model(config: Any, data: TaskData, device: str) -> PreTrainedModel:
    """A model for the task on ``device`` ("meta" for shapes alone), without loading weights."""
    config = copy.deepcopy(config)
    for name, value in data.model_kwargs.items():
        setattr(config, name, value)
    with torch.device(device):
        return getattr(transformers, data.model_class).from_config(config)  # type: ignore[no-any-return]


def check_before_loading(config: Any, data: TaskData, args: APTConfig) -> None:
    """Raise :class:`UserError` for a schedule, budget or target that cannot work, on the meta device.

    A latency budget is measured, so it is checked only once the model is there.
    """
    make_schedule(args, args.total_steps(len(data.train) - args.heldout_rows(len(data.train))))
    settings = copy.copy(args)
    if settings.sparsity_metric == "latency":
        settings.sparsity_metric = "params"
    AdaptivePruner(build_model(config, data, "meta"), settings)


def load_model(settings: ModelSettings, data: TaskData, path: str | None = None) -> PreTrainedModel:
    """The pretrained model with the head of the task (fresh where the checkpoint has none)."""
    auto = getattr(transformers, data.model_class)
    options = {
        "revision": settings.model_revision,
        "trust_remote_code": settings.trust_remote_code,
        "dtype": settings.dtype,
        "ignore_mismatched_sizes": path is None,
        **({"attn_implementation": settings.attn_implementation} if settings.attn_implementation else {}),
        **data.model_kwargs,
    }
    return _from_hub(auto.from_pretrained, path or str(settings.model_name_or_path), **options)  # type: ignore[no-any-return]


def load_saved(path: str, data: TaskData | None = None) -> PreTrainedModel:
    """A finished model, pruned or stock, with the head it was saved with."""
    config = _from_hub(AutoConfig.from_pretrained, path)
    if getattr(config, "apt_base_architecture", None):
        return load_pruned(path)
    if data is not None:
        return _from_hub(getattr(transformers, data.model_class).from_pretrained, path)  # type: ignore[no-any-return]
    cls = getattr(transformers, (config.architectures or ["AutoModel"])[0], transformers.AutoModel)
    return _from_hub(cls.from_pretrained, path)  # type: ignore[no-any-return]


def recipe_of(path: Path) -> Recipe:
    """The recipe that a finished run was started with."""
    if not (path / RECIPE_FILE).is_file():
        raise UserError(f"{path} holds no {RECIPE_FILE}. Name the data with --config.")
    return load_recipe(str(path / RECIPE_FILE), ["--output_dir", str(path)])


def max_positions(config: Any) -> int | None:
    """Longest input in tokens, None when the config does not say."""
    limit = getattr(config, "max_position_embeddings", None)
    return None if limit is None else int(limit)


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _VERSIONS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _from_hub(load: Any, path: str, **options: Any) -> Any:
    local = resolve_path(path)
    try:
        return load(local, **options)
    except OSError as error:
        raise UserError(f"{path} could not be loaded: {str(error).splitlines()[0]}") from error


def _checkpoint_to_resume(output: Path, asked: Any) -> str | None:
    """Path of the checkpoint to go on from; refuses to write over an older run."""
    if asked not in (None, False, "false", "False"):
        if asked not in (True, "true", "True"):
            return str(asked)
        last = get_last_checkpoint(str(output)) if output.is_dir() else None
        if last is None:
            raise UserError(
                f"resume_from_checkpoint is set, but {output} holds no checkpoint. Remove the setting to start anew."
            )
        return last
    written = [name for name in (METRICS_FILE, EVENTS_FILE, "config.json", RECIPE_FILE) if (output / name).exists()]
    if written or (output.is_dir() and get_last_checkpoint(str(output))):
        raise UserError(
            f"output_dir={str(output)!r} already holds a run ({', '.join(written) or 'checkpoints'}). "
            "Choose another output_dir, remove it, or set resume_from_checkpoint: true."
        )
    return None


def _block_parameters(model: PreTrainedModel) -> int:
    blocks = tuple(path + "." for path in family_of(model.config).block_modules(model))
    return sum(p.numel() for name, p in model.named_parameters() if name.startswith(blocks))


def _write_records(output: Path, metrics: Mapping[str, Any], trainer: APTTrainer, data: TaskData) -> None:
    write_json(output / METRICS_FILE, dict(metrics))
    trainer.state.save_to_json(str(output / "trainer_state.json"))
    events = read_events(output / EVENTS_FILE) if (output / EVENTS_FILE).exists() else []
    title = f"{data.metric_name} {metrics['task_metric']:.3f}, {metrics['sparsity']:.0%} removed"
    plot_run(events, trainer.state.log_history, output / PLOT_FILE, title, metric=f"eval_{data.metric_name}")
