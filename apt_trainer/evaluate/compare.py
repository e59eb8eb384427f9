"""What ``apt-trainer benchmark`` measures, and the speed that every run reports at its end.

Times are taken in turns in one process, memory in a process per model (``evaluate.peak``). Not for how good a model
is (``evaluate``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from apt_trainer.errors import UserError
from apt_trainer.evaluate.peak import PeakRequest, measure_peak
from apt_trainer.measure import (
    Generation,
    Latency,
    compare_generation,
    compare_latency,
    count_flops,
    count_parameters,
    dtype_on_disk,
    example_inputs,
    ratio_is_noise,
    size_on_disk,
)
from apt_trainer.measure.generation import start_tokens
from apt_trainer.measure.latency import MAX_SECONDS, MIN_RUNS
from apt_trainer.models import family_of
from apt_trainer.settings import ModelSettings
from apt_trainer.store.pretrained import choose_device, dtype_name, dtype_of, load_dense_shape, load_saved, source_of
from apt_trainer.store.saved_model import dense_copy


def benchmark(
    model: str | ModelSettings,
    baseline: str | None = None,
    batch_sizes: Sequence[int] = (1, 32),
    length: int = 128,
    new_tokens: int = 32,
    device: str | None = None,
) -> dict[str, Any]:
    """Sizes, FLOPs, speed and memory of a saved model beside ``baseline``.

    A model that generates is timed reading prompts and decoding; any other one in a forward pass. Memory is the peak
    while doing that at the largest batch size, weights included, loading and Python itself not.

    Args:
        model: Folder, hub name or GGUF file, or settings that say more, such as ``dtype``.
        baseline: What to compare with; default: the dense shape of the model, with random weights.
        batch_sizes: Sequences per batch.
        length: Tokens per sequence or prompt.
        new_tokens: Tokens decoded per sequence.
        device: Default: the accelerator if there is one, else the CPU.

    Returns:
        What :func:`~apt_trainer.report.tables.comparison_table` reads, and more.

    Raises:
        UserError: a model that cannot be loaded, two that would load in different types, or sizes that they cannot
            take.
    """
    settings = ModelSettings(model) if isinstance(model, str) else model
    other = None if baseline is None else settings.of(baseline)
    place = choose_device(device)
    _check_types(settings, other)  # mistakes are told before processes start
    peaks = measure_memory(settings, max(batch_sizes), length, new_tokens, str(place), other)
    pruned = load_saved(settings).to(place)
    dense = (load_dense_shape(settings) if other is None else load_saved(other)).to(place)
    stored = _stored(settings, pruned)
    metrics: dict[str, Any] = {
        "metric_name": "",
        "device": str(place),
        "dtype": dtype_name(pruned.dtype),
        "threads": torch.get_num_threads(),
        "total_params_dense": count_parameters(dense),
        "total_params": count_parameters(pruned),
        "block_params_dense": _block_parameters(dense),
        "block_params": _block_parameters(pruned),
        **_on_disk("_dense", _would_be_stored(dense, stored) if other is None else _stored(other, dense)),
        **_on_disk("", stored),
        "inference_memory": peaks,
    }
    return metrics | measure_speed(pruned, batch_sizes, length, new_tokens, dense)


def measure_memory(
    settings: ModelSettings,
    batch_size: int,
    length: int,
    new_tokens: int,
    device: str,
    baseline: ModelSettings | None = None,
) -> dict[str, dict[str, Any]]:
    """Memory of running a saved model ("pruned") and ``baseline`` or its dense shape ("dense"), a process each.

    Returns:
        What :func:`~apt_trainer.evaluate.peak.measure_peak` gives for each.

    Raises:
        UserError: a process failed.
    """
    models = (("dense", baseline or settings, baseline is None), ("pruned", settings, False))
    return {
        name: measure_peak(PeakRequest(asdict(which), dense_shape, batch_size, length, new_tokens, device))
        for name, which, dense_shape in models
    }


def measure_speed(
    model: PreTrainedModel,
    batch_sizes: Sequence[int],
    length: int,
    new_tokens: int = 32,
    dense: PreTrainedModel | None = None,
) -> dict[str, Any]:
    """Speed and forward FLOPs of ``model`` and of its dense shape, measured interleaved in this process.

    Models that generate are timed reading prompts and decoding ``new_tokens``, others in a forward pass.
    """
    models = {"dense": dense or dense_copy(model), "pruned": model}
    weights = {name: sum(p.numel() * p.element_size() for p in each.parameters()) for name, each in models.items()}
    if all(each.can_generate() for each in models.values()):
        found = _flops(models, length) | _generation(models, batch_sizes, length, new_tokens)
        caches = {name: speeds[str(max(batch_sizes))]["cache_bytes"] for name, speeds in found["generation"].items()}
        return found | _memory({name: weights[name] + caches[name] for name in models})
    timed = compare_latency(models, list(batch_sizes), length, min_runs=MIN_RUNS, max_seconds=MAX_SECONDS)
    times = {
        name: {str(batch): _times(latency) for batch, latency in of_model.items()} for name, of_model in timed.items()
    }
    rates = {
        name: {str(batch): 1000.0 * batch / latency.median_ms for batch, latency in of_model.items()}
        for name, of_model in timed.items()
    }
    return {
        **({} if model.main_input_name == "pixel_values" else {"latency_length": length}),
        "latency_ms": times,
        "sequences_per_second": rates,
        **_flops(models, length),
        **_memory(weights),
    }


def _memory(sizes: Mapping[str, int]) -> dict[str, int]:
    """Weights, and keys and values at the largest batch: what budgets of memory count (``plan.cost``)."""
    return {"memory_bytes_dense": sizes["dense"], "memory_bytes": sizes["pruned"]}


def _generation(
    models: Mapping[str, PreTrainedModel], batch_sizes: Sequence[int], length: int, new_tokens: int
) -> dict[str, Any]:
    timed = compare_generation(
        models, list(batch_sizes), length, new_tokens, min_runs=MIN_RUNS, max_seconds=MAX_SECONDS
    )
    dense, pruned = timed["dense"], timed["pruned"]
    noise = {
        str(batch): {
            "prefill": ratio_is_noise(dense[batch].prefill, pruned[batch].prefill),
            "decode": ratio_is_noise(dense[batch].decode, pruned[batch].decode),
        }
        for batch in dense
    }
    speeds = {
        name: {str(batch): _speed(generation) for batch, generation in of_model.items()}
        for name, of_model in timed.items()
    }
    return {"prompt_length": length, "new_tokens": new_tokens, "generation": speeds, "within_noise": noise}


def _speed(generation: Generation) -> dict[str, Any]:
    return {
        "prefill_ms": _times(generation.prefill),
        "decode_ms": _times(generation.decode),
        "prefill_tokens_per_second": generation.prefill_tokens_per_second,
        "decode_tokens_per_second": generation.decode_tokens_per_second,
        "cache_bytes": generation.cache_bytes,
    }


def _times(latency: Latency) -> dict[str, float]:
    return asdict(latency)


def _flops(models: Mapping[str, PreTrainedModel], length: int) -> dict[str, int]:
    """Operations of one forward pass at 1 × length; of an encoder–decoder model, with one decoder position."""
    counts = {}
    for name, model in models.items():
        inputs = example_inputs(model, 1, length)
        if model.config.is_encoder_decoder:
            inputs["decoder_input_ids"] = start_tokens(model, inputs)
        counts[name] = count_flops(model, inputs)
    return {"flops_dense": counts["dense"], "flops": counts["pruned"]}


def _block_parameters(model: PreTrainedModel) -> int | None:
    """Parameters in the blocks; None for a model that is not described and so is no result of this package."""
    try:
        blocks = tuple(path + "." for path in family_of(model.config).block_modules(model))
    except UserError:
        return None
    return sum(p.numel() for name, p in model.named_parameters() if name.startswith(blocks))


class _Stored(NamedTuple):
    """Weights as they are on disk: ``size`` in bytes, None where it is not known, and their type."""

    size: int | None
    dtype: str


def _on_disk(which: str, stored: _Stored) -> dict[str, Any]:
    return {f"disk_bytes{which}": stored.size, f"disk_dtype{which}": stored.dtype}


def _stored(settings: ModelSettings, model: PreTrainedModel) -> _Stored:
    """Of ``model``, from the files it was loaded from; of one on the hub, from the type that its config names."""
    source = source_of(settings)
    folder = Path(source.path)
    if source.gguf_file is not None:
        return _Stored((folder / source.gguf_file).stat().st_size if folder.is_dir() else None, "GGUF")
    dtype = dtype_on_disk(folder) if folder.is_dir() else None
    if dtype is not None:
        return _Stored(size_on_disk(folder), dtype)
    saved = dtype_of(replace(settings, dtype="auto"))
    return _Stored(count_parameters(model) * saved.itemsize, dtype_name(saved))


def _would_be_stored(dense: PreTrainedModel, pruned: _Stored) -> _Stored:
    """A dense shape, which is in no file, in the type that the pruned model is stored in."""
    dtype = getattr(torch, pruned.dtype, None)
    size = None if dtype is None else count_parameters(dense) * dtype.itemsize
    return _Stored(size, pruned.dtype)


def _check_types(model: ModelSettings, baseline: ModelSettings | None) -> None:
    """Raise :class:`UserError` where the config of a model cannot be read, or speed in two types would be compared."""
    found = [dtype_name(dtype_of(which)) for which in (model, baseline) if which is not None]
    if len(set(found)) > 1:
        raise UserError(
            f"dtype: auto loads the model in {found[0]} and the baseline in {found[1]}, whose speed and memory cannot "
            f"be compared. Give one dtype for both, for example {found[0]}."
        )
