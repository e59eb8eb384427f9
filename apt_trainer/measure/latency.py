"""Wall-clock time of forward passes, and of anything else that models do in turns.

Single forward calls are timed with ``time.perf_counter`` while the models take turns (A B A B …), so that drift of
the machine (heat, other processes) hits all of them alike. ``torch.utils.benchmark.Timer`` is not used because it
finishes one statement before it starts the next. Not for generation (``generation``) or a data pipeline.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from apt_trainer.errors import UserError

WARM_UP_CALLS = 2
MIN_RUNS = 10
"""Timed calls, at least."""
MAX_SECONDS = 20.0
"""Time after which no further round of calls starts."""
STEADY = 0.05  # interquartile range over median below which more runs would tell nothing new


@dataclass(frozen=True)
class Latency:
    """Median and interquartile range, in milliseconds, of the time of ``runs`` forward calls."""

    median_ms: float
    iqr_ms: float
    runs: int


def example_inputs(
    model: nn.Module, batch_size: int, length: int, device: torch.device | str | None = None
) -> dict[str, Tensor]:
    """Make the same random batch at every call: unpadded tokens or, for a model of images, images.

    Args:
        model: Pretrained model; its ``config`` gives the vocabulary, the padding id and the longest input.
        batch_size: Sequences, or images.
        length: Tokens per sequence; of images, whose size the config gives, it says nothing.
        device: Where the tensors go; default: where the model is.

    Returns:
        ``input_ids`` and ``attention_mask`` (all ones), both [batch_size, length] int64; for a model with an encoder
        and a decoder also ``decoder_input_ids``, as long. Of images ``pixel_values`` [batch_size, channels, height,
        width].

    Raises:
        UserError: a size below 1, or more tokens than the model has positions.
    """
    config: Any = model.config
    longest = getattr(config, "max_position_embeddings", None)
    if batch_size < 1 or length < 1:
        raise UserError(f"batch_size={batch_size} and length={length} must both be at least 1.")
    if longest is not None and length > longest:
        raise UserError(f"length={length} is more than the {longest} positions of the model. Use at most {longest}.")
    generator = torch.Generator().manual_seed(0)
    device = _device_of(model) if device is None else device
    if getattr(model, "main_input_name", None) == "pixel_values":
        config = getattr(config, "vision_config", config)
        sides = config.image_size if isinstance(config.image_size, list | tuple) else [config.image_size] * 2
        pixels = torch.randn(batch_size, config.num_channels, *sides, generator=generator)
        return {"pixel_values": pixels.to(device)}
    input_ids = torch.randint(config.vocab_size, (batch_size, length), generator=generator)
    padding = getattr(config, "pad_token_id", None)
    if padding is not None:  # a padding id inside the text would shift positions in some models
        input_ids[input_ids == padding] = (padding + 1) % config.vocab_size
    batch = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
    if getattr(config, "is_encoder_decoder", False):
        end = getattr(config, "eos_token_id", None)
        if end is not None:  # one per row, where a classifier looks for it
            input_ids[input_ids == end] = end + 1
            input_ids[:, -1] = end
        batch["decoder_input_ids"] = input_ids.clone()
    return {name: value.to(device) for name, value in batch.items()}


def compare_latency(
    models: Mapping[str, nn.Module],
    batch_sizes: Sequence[int],
    length: int,
    *,
    min_runs: int = MIN_RUNS,
    max_seconds: float = MAX_SECONDS,
) -> dict[str, dict[int, Latency]]:
    """Time one forward pass of every model, in turns, on the device where each model is.

    Per batch size there are at least ``min_runs`` rounds, however long they take. Rounds go on until the
    interquartile range of every model is below 5 % of its median, or ``max_seconds`` are over.

    Args:
        models: Models by name. Each runs in evaluation and inference mode and gets its training flags back.
        batch_sizes: Sequences per forward call.
        length: Tokens per sequence.
        min_runs: Timed calls per model and batch size, at least.
        max_seconds: Time per batch size after which no further round starts.

    Returns:
        For each name a :class:`Latency` per batch size.
    """
    results: dict[str, dict[int, Latency]] = {name: {} for name in models}
    with evaluating(*models.values()):
        for batch_size in batch_sizes:
            calls = {name: forward_call(model, batch_size, length) for name, model in models.items()}
            for name, (latency,) in take_turns(calls, min_runs, max_seconds).items():
                results[name][batch_size] = latency
    return results


def forward_call(model: nn.Module, batch_size: int, length: int) -> Callable[[], tuple[float]]:
    """A function that runs one forward pass and returns its seconds, for :func:`take_turns`."""
    return partial(_forward, model, example_inputs(model, batch_size, length))


def shared_timings(
    timings: Mapping[str, list[float]], reduce: Callable[[Tensor], Tensor], processes: int, device: torch.device
) -> dict[str, list[float]]:
    """Mean over ``processes`` of what each has timed, by name, without names of which nothing was timed.

    Choices that rest on seconds have to be equal in all processes. ``reduce``: sums a tensor on ``device`` over them;
    collective where there are several.
    """
    found = {name: seconds for name, seconds in timings.items() if seconds}
    if processes == 1:
        return found
    tensors = {name: torch.tensor(own, dtype=torch.float64, device=device) for name, own in found.items()}
    return {name: (reduce(tensor) / processes).tolist() for name, tensor in tensors.items()}


def ratio_is_noise(a: Latency, b: Latency) -> bool:
    """Tell whether two latencies cannot be told apart: median ± half the interquartile range overlap."""
    return abs(a.median_ms - b.median_ms) <= (a.iqr_ms + b.iqr_ms) / 2


def take_turns(
    calls: Mapping[str, Callable[[], Sequence[float]]], min_runs: int, max_seconds: float
) -> dict[str, list[Latency]]:
    """Run the calls one after the other, round after round, as :func:`compare_latency` describes.

    Args:
        calls: By name, what to run; each returns the seconds of one or several parts of its work, always as many.

    Returns:
        For each name a :class:`Latency` per part.
    """
    for _ in range(WARM_UP_CALLS):
        for call in calls.values():
            call()
    seconds: dict[str, list[Sequence[float]]] = {name: [] for name in calls}
    start = time.perf_counter()
    while True:
        for name, call in calls.items():
            seconds[name].append(call())
        latencies = {name: [_summarise(part) for part in zip(*runs, strict=True)] for name, runs in seconds.items()}
        steady = all(part.iqr_ms <= STEADY * part.median_ms for parts in latencies.values() for part in parts)
        rounds = min(map(len, seconds.values()), default=min_runs)
        if rounds >= min_runs and (steady or time.perf_counter() - start >= max_seconds):
            return latencies


def _forward(model: nn.Module, batch: dict[str, Tensor]) -> tuple[float]:
    device = next(iter(batch.values())).device
    start = now(device)
    model(**batch)
    return (now(device) - start,)


def now(device: torch.device) -> float:
    """Seconds on a clock of this process, once the device has done all it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def _summarise(seconds: Sequence[float]) -> Latency:
    low, median, high = np.percentile(np.asarray(seconds) * 1000, (25, 50, 75))
    return Latency(float(median), float(high - low), len(seconds))


@contextmanager
def placed(model: nn.Module, device: torch.device | str | None) -> Iterator[None]:
    """``model`` on ``device`` for the time, and where it was afterwards; None, or a model without weights: as it is.

    Raises:
        UserError: ``device`` has no room for what is done there.
    """
    before = _device_of(model)
    moves = device is not None and before.type != "meta" and torch.device(device) != before
    try:
        if moves:
            model.to(device)
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"Timing copies of the model needs more memory than {device or before} has. Lower reference_batch_size "
            "or reference_length, or choose a sparsity_metric and nri_cost that are not latency."
        ) from error
    finally:
        if moves:
            model.to(before)


def _device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


@contextmanager
def evaluating(*models: nn.Module, inference: bool = True) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards every sub-module gets back the training flag that it had.

    ``inference``: in inference mode too, which an engine that has split the model may not bear.
    """
    flags = [(module, module.training) for model in models for module in model.modules()]
    for model in models:
        model.eval()
    try:
        with torch.inference_mode() if inference else torch.no_grad():
            yield
    finally:
        for module, training in flags:
            module.training = training
