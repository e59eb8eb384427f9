"""Speed of generation with a cache: reading the prompt (prefill), then one token after the other (decode).

Greedy, every sequence of a batch as long as the others, without an end token: what is timed is the model, not a
server. For encoder–decoder models the prefill is the encoder plus the first step of the decoder. Not for the quality
of what is generated.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from apt_trainer.errors import UserError
from apt_trainer.libraries.calls import cache_name
from apt_trainer.measure.latency import MAX_SECONDS, Latency, evaluating, example_inputs, now, take_turns


@dataclass(frozen=True)
class Generation:
    """What generating for one batch took.

    Attributes:
        prefill: Milliseconds to read the prompts and predict the first new token.
        decode: Milliseconds per further token of every sequence.
        batch_size: Sequences.
        length: Tokens per prompt.
        cache_bytes: Keys and values kept at the end, for the whole batch.
    """

    prefill: Latency
    decode: Latency
    batch_size: int
    length: int
    cache_bytes: int

    @property
    def prefill_tokens_per_second(self) -> float:
        return 1000 * self.batch_size * self.length / self.prefill.median_ms

    @property
    def decode_tokens_per_second(self) -> float:
        return 1000 * self.batch_size / self.decode.median_ms


class _Pass(NamedTuple):
    """One generation: seconds of prefill, seconds per token of decoding, the new tokens, bytes of the cache."""

    prefill: float
    decode: float
    tokens: Tensor
    cache_bytes: int


def compare_generation(
    models: Mapping[str, nn.Module],
    batch_sizes: Sequence[int],
    length: int,
    new_tokens: int,
    *,
    min_runs: int = 5,
    max_seconds: float = MAX_SECONDS,
) -> dict[str, dict[int, Generation]]:
    """Generate with every model in turns, as :func:`~apt_trainer.measure.latency.compare_latency` times forwards.

    Args:
        models: Models by name, on their devices; each gets its training flags back.
        batch_sizes: Sequences per batch.
        length: Tokens per prompt.
        new_tokens: Tokens per sequence that are decoded after the first one, at least 1.
        min_runs: Timed rounds per batch size, at least.
        max_seconds: Time per batch size after which no further round starts.

    Returns:
        For each name a :class:`Generation` per batch size.

    Raises:
        UserError: sizes below 1, or more tokens than a model has positions.
    """
    results: dict[str, dict[int, Generation]] = {name: {} for name in models}
    with evaluating(*models.values()):
        for batch_size in batch_sizes:
            batches = {name: _prompts(model, batch_size, length, new_tokens) for name, model in models.items()}
            sizes = {name: _generate(model, batches[name], new_tokens).cache_bytes for name, model in models.items()}
            calls = {name: partial(_seconds, model, batches[name], new_tokens) for name, model in models.items()}
            for name, (prefill, decode) in take_turns(calls, min_runs, max_seconds).items():
                results[name][batch_size] = Generation(prefill, decode, batch_size, length, sizes[name])
    return results


def generation_call(
    model: nn.Module, batch_size: int, length: int, new_tokens: int
) -> Callable[[], tuple[float, float]]:
    """A function that generates once and returns the seconds of the prompt and of each further token of every
    sequence, for :func:`~apt_trainer.measure.latency.take_turns`."""
    return partial(_seconds, model, _prompts(model, batch_size, length, new_tokens), new_tokens)


def generate_once(model: nn.Module, batch_size: int, length: int, new_tokens: int) -> Tensor:
    """Generate for random prompts; returns the new tokens [batch_size, 1 + new_tokens]."""
    with evaluating(model):
        return _generate(model, _prompts(model, batch_size, length, new_tokens), new_tokens).tokens


def _prompts(model: nn.Module, batch_size: int, length: int, new_tokens: int) -> dict[str, Tensor]:
    config: Any = model.config
    if new_tokens < 1:
        raise UserError(f"new_tokens={new_tokens} must be at least 1.")
    longest, together = getattr(config, "max_position_embeddings", None), length + new_tokens
    if longest is not None and together > longest and not config.is_encoder_decoder:
        raise UserError(
            f"length={length} and new_tokens={new_tokens} make {together} tokens, more than the {longest} positions "
            "of the model. Lower one of them."
        )
    batch = example_inputs(model, batch_size, length)
    batch.pop("decoder_input_ids", None)  # a decoder begins with its own start token
    return batch


def _seconds(model: nn.Module, batch: dict[str, Tensor], new_tokens: int) -> tuple[float, float]:
    done = _generate(model, batch, new_tokens)
    return done.prefill, done.decode


def _generate(model: nn.Module, batch: dict[str, Tensor], new_tokens: int) -> _Pass:
    device = batch["input_ids"].device
    last_only = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    cache = cache_name(model)
    start = now(device)
    inputs, step = _first_step(model, batch)
    output = model(**inputs, **last_only, use_cache=True)
    token = output.logits[:, -1:].argmax(-1)
    read = now(device)
    tokens = [token]
    for _ in range(new_tokens):
        output = model(**step(token), **{cache: getattr(output, cache)}, use_cache=True)
        token = output.logits[:, -1:].argmax(-1)
        tokens.append(token)
    end = now(device)
    size = _cache_bytes(getattr(output, cache))
    return _Pass(read - start, (end - read) / new_tokens, torch.cat(tokens, dim=1), size)


def _first_step(model: Any, batch: dict[str, Tensor]) -> tuple[dict[str, Any], Any]:
    """Inputs of the call that reads the prompt, and a function from a new token [batch, 1] to those of a later one."""
    if not model.config.is_encoder_decoder:
        return batch, lambda token: {"input_ids": token}
    encoded = model.get_encoder()(**batch)
    fixed = {"encoder_outputs": encoded, "attention_mask": batch["attention_mask"]}

    def step(token: Tensor) -> dict[str, Any]:
        return fixed | {"decoder_input_ids": token}

    return step(start_tokens(model, batch)), step


def start_tokens(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """The token that a decoder of an encoder–decoder model starts from, [batch, 1]."""
    start = model.config.decoder_start_token_id
    start = model.config.pad_token_id if start is None else start
    return torch.full_like(batch["input_ids"][:, :1], 0 if start is None else start)


def _cache_bytes(cache: Any) -> int:
    """Bytes of the keys and values in a transformers cache; that of an encoder–decoder model is a pair of caches."""
    pair = (getattr(cache, "self_attention_cache", None), getattr(cache, "cross_attention_cache", None))
    layers = [layer for part in (cache, *pair) for layer in getattr(part, "layers", ())]
    tensors = [value for layer in layers for value in vars(layer).values() if isinstance(value, Tensor)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor.is_floating_point())
