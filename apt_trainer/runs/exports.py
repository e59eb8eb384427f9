"""The formats that a run ends with: checked before anything loads, written and measured after the model is saved.

One that fails does not keep the others from being written.
"""

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

from apt_trainer.errors import Noted, Retold, RunError, UserError, reason
from apt_trainer.settings.config import APTConfig
from apt_trainer.store.events import write_json
from apt_trainer.store.export import RECORD, export, is_timed, load_for_export, parse_format, target_of
from apt_trainer.store.export.check import has_cache
from apt_trainer.store.export.speed import compare_speed
from apt_trainer.tasks import TaskData
from apt_trainer.tasks.embedding import as_texts, embeddings_of

logger = logging.getLogger(__name__)

FOLDER = "export"


def check_exports(args: APTConfig, model: PreTrainedModel, tokenizer: Any) -> None:
    """Raise :class:`UserError` for a format that cannot hold what becomes of ``model`` (on any device)."""
    for name in args.export:
        form, quantize = parse_format(name)
        _check_settings(form, args)
        target_of(form).refuse(model, tokenizer, quantize, cut=args.prunes and args.shape != "uniform")


def _check_settings(form: str, args: APTConfig) -> None:
    """Raise :class:`UserError` for a format that needs another setting."""
    if form == "adapter" and not args.keep_adapters:
        raise UserError("export: [adapter] needs the adapters as they were. Set keep_adapters: true.")
    if form == "per_layer_config" and args.prunes and "hidden" in args.prune_targets:
        raise UserError(
            "export: [per_layer_config] tells heads and neurons of each layer, but prune_targets names hidden "
            "dimensions too. Set prune_targets: [heads, neurons]."
        )
    if form == "decilm" and not args.remote_code:
        raise UserError("export: [decilm] is read by the code in its folder. Leave remote_code: false out.")


def export_all(args: APTConfig, dense: PreTrainedModel, data: TaskData, found: dict[str, Any]) -> None:
    """Write the model in ``output_dir`` in all formats of ``args.export``, measure them, and tell in ``found``.

    Each gets a record (that of :func:`~apt_trainer.store.export.export`) with ``task_metric`` where it is an encoder
    in ONNX, and ``speed`` with ``measure_latency``. ``dense``: on the CPU in float32, for the speed.

    Raises:
        RunError: some could not be written or measured; all others are in ``found``.
    """
    output = Path(str(args.output_dir))
    with _saved_before(output, "loading it for its exports failed", f"apt-trainer export {output} tries again"):
        model, tokenizer = load_for_export(str(output))
    folders = {name: output / FOLDER / name for name in args.export}
    failed: list[str] = []
    for name, folder in folders.items():
        with _told_at_the_end(failed, f"writing it as {name}"):
            _export(name, folder, model, tokenizer, args, data, found)
    timed = {name: folder for name, folder in folders.items() if name in found and is_timed(found[name])}
    if args.measure_latency and timed:
        sizes = args.latency_batch_sizes, args.latency_length, args.latency_new_tokens
        with _told_at_the_end(failed, "timing its exports"):
            for name, speed in compare_speed(dense, model, timed, *sizes).items():
                found[name]["speed"] = speed
    for name, record in found.items():
        write_json(folders[name] / RECORD, record)
    if failed:
        again = [_command(output, name) for name in args.export if name not in found]
        then = f"{' and '.join(again)} tries again" if again else f"what was exported is in its folder {FOLDER}"
        raise RunError(_told(output, ", and ".join(failed), then))


def _export(
    name: str,
    folder: Path,
    model: PreTrainedModel,
    tokenizer: Any,
    args: APTConfig,
    data: TaskData,
    found: dict[str, Any],
) -> None:
    """Write one format to ``folder``, and in ``found`` what was measured."""
    form, quantize = parse_format(name)
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was ended here and goes on
    found[name] = export(model, form, folder, quantize=quantize, tokenizer=tokenizer)
    run = _encoder(model, folder, form, quantize)
    if run is not None:
        found[name]["task_metric"] = task_metric(run, data, args.per_device_eval_batch_size)


def _command(output: Path, name: str) -> str:
    """What exports the model in ``output`` as ``name`` by itself."""
    form, quantize = parse_format(name)
    return f"apt-trainer export {output} --format {form}{f' --quantize {quantize}' if quantize else ''} --output DIR"


def _encoder(model: PreTrainedModel, folder: Path, form: str, quantize: str | None) -> Any:
    """What is in ``folder`` as a function of its inputs; None for a decoder, or where nothing here runs it."""
    if has_cache(model) or not target_of(form).IS_RUN:
        return None
    return target_of(form).load(folder, quantize, 0, torch.get_num_threads())


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
        return RunError(_told(output, f"{failed} ({reason(error)})", then))

    return Retold(retell)


def _told_at_the_end(failed: list[str], what: str) -> Noted:
    """Context for one of several exports: what fails there is noted in ``failed``, and the next one begins."""

    def note(error: Exception) -> None:
        logger.error("After the model was saved:", exc_info=error)
        failed.append(f"{what} failed ({reason(error)})")

    return Noted(note)


def _told(output: Path, failed: str, then: str) -> str:
    return (
        f"The model is trained and saved in {output}, but {failed}. What had been measured is in metrics.json there; "
        f"{then}."
    )
