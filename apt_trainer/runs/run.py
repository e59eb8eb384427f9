"""One run from a recipe to a folder: data, model, training, evaluation, measurement, records.

Everything that ``apt-trainer train`` does, and ``evaluate`` on the data of a recipe, without the command line. Not for
the method itself (``trainer``, ``pruner``), nor for language models on text (``evaluate``).
"""

from __future__ import annotations

import copy
import logging
import platform
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import EvalPrediction, set_seed

from apt_trainer.errors import Noted, Retold, RunError, UserError, reason
from apt_trainer.evaluate.compare import measure_memory, measure_speed
from apt_trainer.evaluate.differences import keep_predictions
from apt_trainer.evaluate.harness import run_tasks
from apt_trainer.evaluate.task_intervals import Intervals, score_intervals
from apt_trainer.libraries.quiet import write_line
from apt_trainer.libraries.versions import installed
from apt_trainer.measure import PeakMemory, count_parameters, return_freed_memory
from apt_trainer.report.plots import plot_run
from apt_trainer.report.story import opening
from apt_trainer.report.tables import comparison_table, exports_table, format_count
from apt_trainer.runs.dense_baseline import train_dense
from apt_trainer.runs.exports import FOLDER as EXPORTS
from apt_trainer.runs.exports import export_all
from apt_trainer.runs.preflight import check_before_loading, check_installed, checkpoint_to_resume, finished_run
from apt_trainer.runs.sizes import sizes
from apt_trainer.runs.vocabulary import vocabulary_cut
from apt_trainer.settings import ModelSettings
from apt_trainer.settings.packages import check_packages
from apt_trainer.settings.recipe import Recipe, load_recipe
from apt_trainer.store.events import EVENTS_FILE, METRICS_FILE, RECIPE_FILE, read_events, write_json
from apt_trainer.store.lock import FolderLock
from apt_trainer.store.pretrained import build_model, load_inputs, load_model, load_saved, load_teacher
from apt_trainer.store.saved_model import dense_copy
from apt_trainer.tasks import TaskData, keeps_sequences_apart
from apt_trainer.tasks.base import ComputeMetrics
from apt_trainer.tasks.shared_rows import is_sharing, keeping_rows
from apt_trainer.tasks.trainer_options import data_options, set_task_arguments
from apt_trainer.training.embedding_trainer import APTEmbeddingTrainer, PlainEmbeddingTrainer
from apt_trainer.training.engines import engine_name
from apt_trainer.training.engines.agreement import failing_together
from apt_trainer.training.evaluation_loop import plain_trainer
from apt_trainer.training.progress import use_run_progress
from apt_trainer.training.termination import finishing
from apt_trainer.training.time_to_accuracy import TimeToAccuracy
from apt_trainer.training.trackers import one_run
from apt_trainer.training.trainer import APTTrainer

logger = logging.getLogger(__name__)

PLOT_FILE = "run.png"
_SECRET = ("hub_token",)
_VERSIONS = ("apt_trainer", "torch", "transformers", "peft", "accelerate", "deepspeed", "datasets")
_COMPARED = ("task_metric", "task_metric_low", "task_metric_high", "train_seconds", "peak_memory_bytes")


def train(recipe: Recipe) -> dict[str, Any]:
    """Train, prune, evaluate, save and measure; returns what ``metrics.json`` holds.

    With ``resume_from_checkpoint: auto`` a run that has finished is not run again.

    Raises :class:`UserError` before weights load or anything is written when the recipe cannot work, or while another
    run writes to ``output_dir``. A smaller ``vocabulary`` is made before most of that can be told.
    """
    if recipe.training.process_index > 0:
        return _train(recipe, None)
    with FolderLock(Path(str(recipe.training.output_dir))) as lock:
        return _train(recipe, lock)


def _train(recipe: Recipe, lock: FolderLock | None) -> dict[str, Any]:
    args = recipe.training
    output = Path(str(args.output_dir))
    finished = finished_run(recipe)
    if finished is not None:
        return finished
    return_freed_memory()
    resume_from = checkpoint_to_resume(recipe)
    check_installed(recipe)
    with vocabulary_cut(recipe, output / "vocabulary") as (recipe, vocabulary):
        return _train_prepared(recipe, output, lock, resume_from, vocabulary)


def _train_prepared(
    recipe: Recipe, output: Path, lock: FolderLock | None, resume_from: str | None, vocabulary: dict[str, Any]
) -> dict[str, Any]:
    args = recipe.training
    memory = PeakMemory(args.device.type)
    set_seed(args.seed)
    tokenizer, data, dense = _prepare(recipe, output, shares_rows=not vocabulary)
    path = args.teacher_name_or_path
    teacher = load_teacher(recipe.model.of(path), data) if path else None
    model = load_model(recipe.model, data)
    if data.packed and not keeps_sequences_apart(model):
        raise UserError(
            f"packing: true, but in {type(model).__name__} packed sequences would see each other. Set packing: false."
        )
    start_parameters = count_parameters(model)
    trainer: Any = (APTTrainer if data.embedding_loss is None else APTEmbeddingTrainer)(
        model=model,
        args=args,
        train_dataset=data.train,
        teacher=teacher,
        eval_dataset=data.validation,
        processing_class=tokenizer,
        **data_options(data, "validation"),
    )
    trainer.uploads_after_training = False  # but below, with what is made of the model
    use_run_progress(trainer, "pruning and tuning" if args.prunes else "fine-tuning", logs_too=True)
    watch, engine = _watch_accuracy(trainer, data), engine_name(trainer)
    if lock is not None:
        _take_folder(output, recipe, lock, anew=resume_from is None)
    with one_run(trainer):
        started, cpu_started = time.perf_counter(), time.process_time()
        result = trainer.train(resume_from_checkpoint=resume_from)
        seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
        peak = memory.above_start()
        with finishing("saving the model"), failing_together():
            trainer.save_model(str(output))
        dtype = trainer.model.dtype
        with _saved_in(output):
            predictions: list[EvalPrediction] = []
            trainer.compute_metrics = _keeping(data.metrics["test"], predictions)
            scores = trainer.evaluate(data.test, metric_key_prefix=data.test_name)
            intervals = {}
            if trainer.is_world_process_zero():
                intervals = _intervals(recipe, data, predictions)
                order = partial(trainer.evaluation_order, data.test)
                keep_predictions(output, output / "dense", data, tokenizer, predictions[:1], order)
    if args.bf16_full_eval or args.fp16_full_eval:  # they leave it in theirs; what follows is for what was saved
        trainer.model.to(dtype)
    metrics = {
        "metric_name": data.metric_name,
        "task_metric": scores[f"{data.test_name}_{data.metric_name}"],
        "greater_is_better": data.greater_is_better,
        "evaluated_on": data.test_name,
        "scores": {name: value for name, value in scores.items() if isinstance(value, float)},
        **sizes(trainer, output, start_parameters, vocabulary),
        "resumed": resume_from is not None,
        "train_seconds": seconds,
        "train_cpu_seconds": cpu_seconds,
        "train_steps": trainer.state.global_step,
        "train_loss": result.training_loss,
        "peak_memory_bytes": peak,
        "data_fingerprint": data.fingerprint,
        "seed": args.seed,
        "threads": torch.get_num_threads(),
        "device": str(args.device),
        "engine": engine,
        "versions": {"python": platform.python_version()}
        | {name: found for name in _VERSIONS if (found := installed(name))},
    }
    if data.metric_name in intervals:
        metrics["task_metric_low"], metrics["task_metric_high"] = intervals[data.metric_name]
    metrics |= {f"{name}_dense": dense[name] for name in _COMPARED if name in dense}
    if args.load_best_model_at_end and trainer.state.best_model_checkpoint is not None:
        metrics["best_checkpoint"] = Path(trainer.state.best_model_checkpoint).name
    if watch is not None:
        metrics["evaluations"] = watch.evaluations
        if args.reference_metric is not None:
            share = args.reference_share if data.greater_is_better else 1 / args.reference_share
            metrics["time_to_accuracy"] = watch.record(args.reference_metric * share, data.greater_is_better)
    _measure_export_and_upload(metrics, recipe, trainer, tokenizer, data)
    return metrics


def _prepare(recipe: Recipe, output: Path, shares_rows: bool) -> tuple[Any, TaskData, dict[str, Any]]:
    """Tokenizer, data and what the dense model came to, if it is asked for; raises :class:`UserError` as
    :func:`train`. ``shares_rows``: whether the dense model has the same tokenizer."""
    args = recipe.training
    if is_sharing():  # what is odd about the data has been said by the run that started this one
        logging.getLogger("apt_trainer.tasks").setLevel(logging.ERROR)
    else:
        write_line(f"Reading {recipe.data.dataset_name or recipe.data.train_file}")
    with ExitStack() as reading:
        rows = reading.enter_context(keeping_rows()) if shares_rows and args.dense_baseline else {}
        tokenizer, config, data = load_inputs(recipe.model, recipe)
    set_task_arguments(args, data, recipe.given)
    check_before_loading(recipe, config, data, tokenizer)
    if not is_sharing():  # else the run that started this one has told it
        _tell_opening(recipe, config, data)
    return tokenizer, data, train_dense(recipe, output, rows) if args.dense_baseline and args.should_save else {}


def _tell_opening(recipe: Recipe, config: Any, data: TaskData) -> None:
    args, settings = recipe.training, recipe.data
    parameters = format_count(count_parameters(build_model(config, data, "meta", recipe.model.dtype)))
    model = f"{recipe.model.model_name_or_path} ({config.model_type}, {parameters} parameters) for {settings.task}"
    rows = {"train": len(data.train), "validation": len(data.validation), "labels": len(data.label_names)}
    if data.test_name == "test":
        rows["test"] = len(data.test)
    steps = args.total_steps(len(data.train) - args.heldout_rows(len(data.train)))
    files = str(settings.dataset_name or settings.train_file)
    for line in opening(model, rows, files, steps, args, str(args.device)):
        write_line(line)


def _take_folder(output: Path, recipe: Recipe, lock: FolderLock, anew: bool) -> None:
    """Make ``output`` the folder of this run; what an earlier one left that ended before its first checkpoint goes."""
    output.mkdir(parents=True, exist_ok=True)
    lock.take()
    write_json(output / RECIPE_FILE, {key: value for key, value in recipe.given.items() if key not in _SECRET})
    if anew:
        (output / EVENTS_FILE).unlink(missing_ok=True)


def _saved_in(output: Path) -> Retold:
    """Context for what comes after the save: what fails there is told with the place of the model."""

    def retell(error: Exception) -> Exception:
        logger.error("After the model was saved:", exc_info=error)
        return RunError(
            f"The model is trained and saved in {output}, but measuring it failed ({reason(error)}). What had been "
            f"measured is in {METRICS_FILE} there; apt-trainer evaluate {output} measures again."
        )

    return Retold(retell)


def _measure_export_and_upload(
    metrics: dict[str, Any], recipe: Recipe, trainer: APTTrainer, tokenizer: Any, data: TaskData
) -> None:
    """What follows the save. The model is uploaded whatever else failed; all that did is raised at the end."""
    failed: list[Exception] = []
    with Noted(failed.append):
        if trainer.is_world_process_zero():
            _measure_and_export(metrics, recipe, trainer, tokenizer, data)
    with Noted(failed.append):
        trainer.upload_if_asked(saved=True, beside=Path(str(recipe.training.output_dir)) / EXPORTS)
    if failed:
        raise failed[0] if len(failed) == 1 else RunError(" ".join(map(str, failed))) from failed[0]


def _measure_and_export(
    metrics: dict[str, Any], recipe: Recipe, trainer: APTTrainer, tokenizer: Any, data: TaskData
) -> None:
    """Where it fails, all that had been measured is recorded all the same."""
    args = recipe.training
    output = Path(str(args.output_dir))
    try:
        with _saved_in(output):
            _measure_further(metrics, recipe, trainer, tokenizer)
        if args.export:
            write_line(f"Exporting as {', '.join(args.export)}")
            metrics["exports"] = {}
            export_all(args, dense_copy(trainer.model, "cpu").float(), data, metrics["exports"])
    finally:
        with _saved_in(output):
            try:
                _write_card(metrics, recipe, trainer)
            finally:
                _write_records(output, metrics, trainer, data)


def _measure_further(metrics: dict[str, Any], recipe: Recipe, trainer: APTTrainer, tokenizer: Any) -> None:
    """Add to ``metrics`` what the recipe asks for beside the metric of its task."""
    args = recipe.training
    if args.lm_eval_tasks:
        metrics["lm_eval"] = run_tasks(
            trainer.model, tokenizer, args.lm_eval_tasks, batch_size=args.per_device_eval_batch_size
        )
    if args.measure_latency:
        write_line(f"Saved in {args.output_dir}. Measuring its speed and memory beside the dense shape")
        metrics |= measure_speed(trainer.model, args.latency_batch_sizes, args.latency_length, args.latency_new_tokens)
        metrics |= _inference_memory(recipe)


def _inference_memory(recipe: Recipe) -> dict[str, Any]:
    """Peak memory of running what was saved and its dense shape; empty, with a warning, where that fails."""
    args = recipe.training
    saved = recipe.model.of(str(args.output_dir))
    sizes = max(args.latency_batch_sizes), args.latency_length, args.latency_new_tokens
    try:
        return {"inference_memory": measure_memory(saved, *sizes, str(args.device))}
    except UserError as error:  # for example no room beside this process; the run is not lost for that
        logger.warning("The memory of inference was not measured. %s", error)
        return {}


def _watch_accuracy(trainer: APTTrainer, data: TaskData) -> TimeToAccuracy | None:
    """Watch the evaluations of the run, if it has any while it trains."""
    if trainer.args.eval_strategy == "no":
        return None
    watch = TimeToAccuracy(
        f"eval_{data.metric_name}", is_pruned=lambda: trainer.state.global_step >= trainer.schedule.end
    )
    trainer.add_callback(watch)
    return watch


def evaluate(model: str | ModelSettings, recipe: Recipe | None = None) -> dict[str, float]:
    """Metrics of a saved model on the test data of ``recipe``, or of the recipe it was trained with.

    ``model`` is a folder or hub name, or says more than that. The scores of the task also have the ends of their 95 %
    confidence interval, as ``…accuracy_low`` and ``…accuracy_high`` (test rows drawn with replacement).
    """
    path = model if isinstance(model, str) else str(model.model_name_or_path)
    recipe = recipe or recipe_of(Path(path))
    settings = ModelSettings(path, dtype=recipe.model.dtype) if isinstance(model, str) else model
    check_packages({**vars(settings), **vars(recipe.data)})
    tokenizer, _, data = load_inputs(settings, recipe, trained=False)
    args = copy.copy(recipe.training)
    args.report_to, args.push_to_hub = [], False
    set_task_arguments(args, data, recipe.given)
    predictions: list[EvalPrediction] = []
    metrics = _keeping(data.metrics["test"], predictions)
    trainer: Any = (plain_trainer if data.embedding_loss is None else PlainEmbeddingTrainer)(
        load_saved(settings, data),
        args,
        eval_dataset=data.test,
        processing_class=tokenizer,
        **(data_options(data, "test") | {"compute_metrics": metrics}),
    )
    use_run_progress(trainer, logs_too=True)
    scores = trainer.evaluate(metric_key_prefix=data.test_name)
    scores = {name: value for name, value in scores.items() if isinstance(value, float)}
    for name, (low, high) in _intervals(recipe, data, predictions).items():
        scores |= {f"{data.test_name}_{name}_low": low, f"{data.test_name}_{name}_high": high}
    return scores


def _keeping(metrics: ComputeMetrics, predictions: list[EvalPrediction]) -> ComputeMetrics:
    """``metrics``, which put what they are given into ``predictions`` too."""

    def kept(prediction: EvalPrediction) -> dict[str, float]:
        predictions.append(prediction)
        return metrics(prediction)

    return kept


def _intervals(recipe: Recipe, data: TaskData, predictions: Sequence[EvalPrediction]) -> Intervals:
    """95 % confidence intervals of the scores on the test rows, as far as one is known."""
    compute, sums = data.metrics["test"], data.sums.get("test")
    if not predictions:
        return {}
    return score_intervals(recipe.data.task, data.metric_name, predictions[0], compute, sums, data.label_names)


def recipe_of(path: Path) -> Recipe:
    """The recipe that a finished run was started with."""
    if not (path / RECIPE_FILE).is_file():
        raise UserError(f"{path} holds no {RECIPE_FILE}. Name the data with --config.")
    return load_recipe(str(path / RECIPE_FILE), ["--output_dir", str(path)])


def _write_card(metrics: Mapping[str, Any], recipe: Recipe, trainer: APTTrainer) -> None:
    """Put what was measured, the data and the recipe on the model card."""
    results = f"On {metrics['evaluated_on']}:\n\n{comparison_table(metrics)}"
    if metrics.get("exports"):
        results += f"\n\n{exports_table(metrics)}"
    given = {key: value for key, value in recipe.given.items() if key not in _SECRET}
    name, file = recipe.data.dataset_name, recipe.data.train_file
    public = name if name and not Path(name).exists() else None
    dataset = name or (Path(file).name if file else None)
    trainer.create_model_card(results=results, recipe=given, dataset_tags=public, dataset=dataset)


def _write_records(output: Path, metrics: Mapping[str, Any], trainer: APTTrainer, data: TaskData) -> None:
    trainer.state.save_to_json(str(output / "trainer_state.json"))
    try:
        _plot(output, metrics, trainer, data)
    finally:
        write_json(output / METRICS_FILE, dict(metrics))  # the last of all: a run with metrics has finished


def _plot(output: Path, metrics: Mapping[str, Any], trainer: APTTrainer, data: TaskData) -> None:
    events = read_events(output / EVENTS_FILE) if (output / EVENTS_FILE).exists() else []
    title = f"{data.metric_name} {metrics['task_metric']:.3f}, {metrics['sparsity']:.0%} removed"
    plot_run(events, trainer.state.log_history, output / PLOT_FILE, title, metric=f"eval_{data.metric_name}")
