"""The formats that a run ends with: checked before anything loads, written and measured after the model is saved."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import EvalPrediction, PreTrainedModel
from transformers.trainer_pt_utils import EvalLoopContainer

from apt_trainer.errors import Retold, RunError, reason
from apt_trainer.settings.config import APTConfig
from apt_trainer.store.events import write_json
from apt_trainer.store.export import RECORD, export, load_for_export, parse_format, target_of
from apt_trainer.store.export.onnx import has_cache
from apt_trainer.store.export.onnx_session import OnnxModel
from apt_trainer.store.export.speed import compare_speed
from apt_trainer.tasks import TaskData
from apt_trainer.tasks.embedding import as_texts, embeddings_of

logger = logging.getLogger(__name__)

FOLDER = "export"


def check_exports(args: APTConfig, model: PreTrainedModel, tokenizer: Any) -> None:
    """Raise :class:`UserError` for a format that cannot hold what becomes of ``model`` (on any device)."""
    for name in args.export:
        form, quantize = parse_format(name)
        target_of(form).refuse(model, tokenizer, quantize, cut=args.prunes and args.shape != "uniform")


def export_all(args: APTConfig, dense: PreTrainedModel, data: TaskData, found: dict[str, Any]) -> None:
    """Write the model in ``output_dir`` in all formats of ``args.export``, measure them, and tell in ``found``.

    Each gets a record (that of :func:`~apt_trainer.store.export.export`) with ``task_metric`` where it is an encoder
    in ONNX, and ``speed`` with ``measure_latency``. ``dense``: on the CPU in float32, for the speed.

    Raises:
        RunError: one could not be written or measured; those before it are in ``found``.
    """
    output = Path(str(args.output_dir))
    with _saved_before(output, "loading it for its exports failed", f"apt-trainer export {output} tries again"):
        model, tokenizer = load_for_export(str(output))
    folders = {name: output / FOLDER / name for name in args.export}
    for name, folder in folders.items():
        form, quantize = parse_format(name)
        again = f"apt-trainer export {output} --format {form}" + (f" --quantize {quantize}" if quantize else "")
        with _saved_before(output, f"writing it as {name} failed", f"{again} --output DIR tries again"):
            shutil.rmtree(folder, ignore_errors=True)  # of a run that was ended here and goes on
            found[name] = export(model, form, folder, quantize=quantize, tokenizer=tokenizer)
            if not has_cache(model):
                run = OnnxModel(folder / found[name]["file"], torch.get_num_threads())
                found[name]["task_metric"] = task_metric(run, data, args.per_device_eval_batch_size)
    timed = {name: folder for name, folder in folders.items() if found[name]["loaded_by"] is not None}
    if args.measure_latency and timed:
        sizes = args.latency_batch_sizes, args.latency_length, args.latency_new_tokens
        with _saved_before(output, "timing its exports failed", f"they are in its folder {FOLDER}"):
            for name, speed in compare_speed(dense, model, timed, *sizes).items():
                found[name]["speed"] = speed
    for name, folder in folders.items():
        write_json(folder / RECORD, found[name])


def task_metric(run: Callable[[Mapping[str, Any]], Mapping[str, Any]], data: TaskData, batch_size: int) -> float:
    """The metric of a task on its test rows; ``run``: from a batch to the outputs of an encoder, numpy arrays."""
    predictions = EvalLoopContainer(do_nested_concat=True, padding_index=-100)
    labels = EvalLoopContainer(do_nested_concat=True, padding_index=-100)
    for batch in DataLoader(data.test, batch_size, collate_fn=data.collator):  # type: ignore[arg-type]
        embeds = data.embedding_loss is not None
        found = run(as_texts(batch) if embeds else batch).values()
        given = _one_or_all(tuple(batch[name] for name in _labels_in(batch)))
        predicted = _one_or_all(tuple(torch.from_numpy(values) for values in found))
        if embeds:
            predicted = embeddings_of(predicted, batch)
        if data.preprocess_logits is not None:
            predicted = data.preprocess_logits(predicted, given)
        predictions.add(predicted)
        labels.add(given)
    scores = data.metrics["test"](EvalPrediction(predictions.get_arrays(), labels.get_arrays()))
    return float(scores[data.metric_name])


def _labels_in(batch: Mapping[str, Any]) -> list[str]:
    return [name for name in ("labels", "start_positions", "end_positions") if name in batch]


def _one_or_all(values: tuple[torch.Tensor, ...]) -> Any:
    return values[0] if len(values) == 1 else values


def _saved_before(output: Path, failed: str, then: str) -> Retold:
    """Context for exports: what fails there is told with the place of the model, and what can be done."""

    def retell(error: Exception) -> Exception:
        logger.error("After the model was saved:", exc_info=error)
        return RunError(
            f"The model is trained and saved in {output}, but {failed} ({reason(error)}). What had been measured is "
            f"in metrics.json there; {then}."
        )

    return Retold(retell)
