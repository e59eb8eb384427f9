"""What ``apt-trainer benchmark`` measures, and the speed that every run reports at its end.

Times are taken in turns in one process, memory in a process per model (``evaluate.peak``). Not for how good a model
is (``evaluate``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

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
    example_inputs,
    ratio_is_noise,
    size_on_disk,
)
from apt_trainer.measure.generation import start_tokens
from apt_trainer.models import family_of
from apt_trainer.settings import ModelSettings
from apt_trainer.store.pretrained import choose_device, load_dense_shape, load_saved, read_config, source_of
from apt_trainer.store.saved_model import dense_copy

MIN_RUNS = 10
MAX_SECONDS = 20.0  # per batch size, after which no further round starts


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
        UserError: a model that cannot be loaded, or sizes that it cannot take.
    """
    settings = ModelSettings(model) if isinstance(model, str) else model
    other = None if baseline is None else settings.of(baseline)
    place = choose_device(device)
    for which in (settings, other):  # mistakes are told before processes start
        if which is not None:
            read_config(which)
    peaks = measure_memory(settings, max(batch_sizes), length, new_tokens, str(place), other)
    pruned = load_saved(settings).to(place)
    dense = (load_dense_shape(settings) if other is None else load_saved(other)).to(place)
    metrics: dict[str, Any] = {
        "metric_name": "",
        "device": str(place),
        "dtype": str(pruned.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "total_params_dense": count_parameters(dense),
        "total_params": count_parameters(pruned),
        "block_params_dense": _block_parameters(dense),
        "block_params": _block_parameters(pruned),
        "disk_bytes_dense": _tensor_bytes(dense) if other is None else _disk_bytes(other, dense),
        "disk_bytes": _disk_bytes(settings, pruned),
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
    if all(each.can_generate() for each in models.values()):
        return _flops(models, length) | _generation(models, batch_sizes, length, new_tokens)
    timed = compare_latency(models, list(batch_sizes), length, min_runs=MIN_RUNS, max_seconds=MAX_SECONDS)
    times = {
        name: {str(batch): _times(latency) for batch, latency in of_model.items()} for name, of_model in timed.items()
    }
    rates = {
        name: {str(batch): 1000.0 * batch / latency.median_ms for batch, latency in of_model.items()}
        for name, of_model in timed.items()
    }
    return {
        "latency_length": length,
        "latency_ms": times,
        "sequences_per_second": rates,
        **_flops(models, length),
    }


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


def _tensor_bytes(model: PreTrainedModel) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


def _disk_bytes(settings: ModelSettings, model: PreTrainedModel) -> int:
    """Bytes of the weight files; of a model on the hub, of its tensors."""
    source = source_of(settings)
    if source.gguf_file is not None and Path(source.path).is_dir():
        return (Path(source.path) / source.gguf_file).stat().st_size
    return size_on_disk(source.path) if Path(source.path).is_dir() else _tensor_bytes(model)
