"""Speed of exported models beside the same model and the dense one in PyTorch: they take turns in one process.

All run on the CPU, with as many threads each as PyTorch has here. The dense model has random weights.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from apt_trainer.measure.generation import generation_call
from apt_trainer.measure.latency import (
    MAX_SECONDS,
    MIN_RUNS,
    Latency,
    evaluating,
    example_inputs,
    forward_call,
    take_turns,
)
from apt_trainer.store.export import RECORD, Running, target_of
from apt_trainer.store.export.check import has_cache

DENSE, PRUNED = "dense", "pruned"
_Call = Callable[[], Sequence[float]]


def compare_speed(
    dense: PreTrainedModel,
    pruned: PreTrainedModel,
    exports: Mapping[str, Path],
    batch_sizes: Sequence[int],
    length: int,
    new_tokens: int,
) -> dict[str, dict[str, Any]]:
    """Time ``exports`` (name → folder that :func:`~apt_trainer.store.export.export` has made), in turns.

    Args:
        dense: on the CPU, in float32; the weights do not matter.
        pruned: what was exported, on the CPU, in float32.
        exports: by name.
        batch_sizes: sequences per call; llama.cpp takes part in 1 only.
        length: tokens per sequence or prompt.
        new_tokens: tokens per sequence that are decoded after the first one, where the model generates.

    Returns:
        For each export ``device``, ``threads``, ``length``; ``milliseconds``: {``dense``, ``pruned`` (both in
        PyTorch), ``export``: {batch size: {``forward``, or ``prefill`` and ``decode`` per token: median …}}};
        ``speedup``: {``pruned``, ``export``: {batch size: {part: how many times as fast as ``dense``}}}; and, where
        it generates, ``tokens_per_second`` of the export: {batch size: {part: …}}.
    """
    threads, cached = torch.get_num_threads(), has_cache(pruned)
    running = {name: _loaded(folder, length + new_tokens + 1, threads) for name, folder in exports.items()}
    parts = ("prefill", "decode") if cached else ("forward",)
    timed: dict[str, dict[int, list[Latency]]] = {name: {} for name in (DENSE, PRUNED, *exports)}
    with evaluating(dense, pruned):
        for size in batch_sizes:
            calls: dict[str, _Call] = {}
            for name, model in ((DENSE, dense), (PRUNED, pruned)):
                calls[name] = (
                    generation_call(model, size, length, new_tokens) if cached else forward_call(model, size, length)
                )
            batch = {name: value.numpy() for name, value in example_inputs(pruned, size, length).items()}
            for name, run in running.items():
                if run.largest_batch is None or size <= run.largest_batch:
                    calls[name] = partial(run.seconds, batch, new_tokens)
            for name, latencies in take_turns(calls, MIN_RUNS, MAX_SECONDS).items():
                timed[name][size] = latencies
    found = {}
    for name in exports:
        speed: dict[str, Any] = {"device": "cpu", "threads": threads, "length": length}
        speed["milliseconds"] = {
            label: {str(size): dict(zip(parts, map(asdict, times), strict=True)) for size, times in timed[who].items()}
            for label, who in ((DENSE, DENSE), (PRUNED, PRUNED), ("export", name))
        }
        speed["speedup"] = {label: _speedup(speed["milliseconds"], label) for label in (PRUNED, "export")}
        if cached:
            speed["tokens_per_second"] = _rates(speed["milliseconds"]["export"], length)
        found[name] = speed
    return found


def _speedup(times: Mapping[str, Any], which: str) -> dict[str, dict[str, float]]:
    return {
        size: {part: times[DENSE][size][part]["median_ms"] / each["median_ms"] for part, each in parts.items()}
        for size, parts in times[which].items()
    }


def _rates(times: Mapping[str, Mapping[str, Any]], length: int) -> dict[str, dict[str, float]]:
    return {
        size: {
            "prefill": 1000 * int(size) * length / parts["prefill"]["median_ms"],
            "decode": 1000 * int(size) / parts["decode"]["median_ms"],
        }
        for size, parts in times.items()
    }


def _loaded(folder: Path, length: int, threads: int) -> Running:
    record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    return target_of(record["format"]).load(folder, record["quantize"], length, threads)
