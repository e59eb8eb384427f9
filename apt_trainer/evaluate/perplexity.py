"""Perplexity of a decoder on running text.

The text is one stream of tokens, cut into windows (``tasks.text_windows``); a window sees nothing of the one before
except what it overlaps. The number depends on tokenizer, window, stride and start token: compare only where all four
are the same. Not for masked or encoder–decoder models, which have no probability of a text.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from apt_trainer.errors import UserError
from apt_trainer.evaluate.bootstrap import Interval, mean_interval
from apt_trainer.measure import evaluating
from apt_trainer.measure.likelihood import LARGEST, summed_loss
from apt_trainer.tasks.text_windows import Window, cut, frame_of, plain_ids


@dataclass(frozen=True)
class Perplexity:
    """Perplexity and what it was counted on.

    Attributes:
        nll: Mean negative log-likelihood per predicted token, in nats, of each window, in order.
        counts: Predicted tokens of each window.
        window: Tokens per window.
        stride: Tokens from the start of one window to that of the next.
        start: Ids of what every window begins with; empty where that is the text itself.
    """

    nll: tuple[float, ...]
    counts: tuple[int, ...]
    window: int
    stride: int
    start: tuple[int, ...] = ()

    @property
    def value(self) -> float:
        """exp of the mean negative log-likelihood over all predicted tokens."""
        return math.exp(float(np.average(self.nll, weights=self.counts)))

    @property
    def predicted_tokens(self) -> int:
        return sum(self.counts)

    def interval(self, seed: int = 0) -> Interval | None:
        """95 % confidence interval of ``value``, windows drawn with replacement; None for a single window."""
        if len(self.nll) < 2:
            return None
        low, high = mean_interval(self.nll, self.counts, seed=seed)
        return Interval(math.exp(low), math.exp(high))


def perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    window: int = 1024,
    stride: int | None = None,
    max_tokens: int | None = None,
    batch_size: int = 1,
    start_token: bool | None = None,
) -> Perplexity:
    """Exact, token-weighted perplexity of ``text``.

    Every window begins with the start token where ``tokenizer`` puts one before a text, and all its other tokens are
    predicted. Without a start token and without ``stride`` the first token of each window is context only (window - 1
    predictions). With a stride every token is predicted once, from at least window - stride tokens before it; only
    the first window has less. What is left at the end makes a shorter window.

    Args:
        model: Decoder with a language-model head, on any device; it runs in evaluation mode and gets its mode back.
        tokenizer: Its tokenizer; no special tokens are added to the text but the start token.
        text: Running text.
        window: Tokens per window, the start token included; at least 2 and at most the positions of the model.
        stride: Tokens from one window to the next, 1 to ``window``; default: no overlap.
        max_tokens: Use only the first tokens of the text.
        batch_size: Windows per forward pass.
        start_token: Whether windows begin with the tokenizer's start token; default: where the tokenizer adds it.

    Raises:
        UserError: a model that is no decoder, a size that cannot work, a text with nothing to predict, or a loss that
            is not a finite number.
    """
    stride = window if stride is None else stride
    _check(model, window, stride, batch_size)
    start = _start(tokenizer, start_token)
    if len(start) >= window:
        raise UserError(f"window={window} must be more than the {len(start)} tokens that each window begins with.")
    tokens = plain_ids(tokenizer, text)[:max_tokens]
    windows = list(cut(tokens, window, start, stride))
    if not windows:
        raise UserError(f"The text has {len(tokens):,} tokens, so nothing is predicted. Give a longer text.")
    nll = _window_losses(model, windows, batch_size)
    return Perplexity(tuple(nll), tuple(one.scored for one in windows), window, stride, start)


def _check(model: PreTrainedModel, window: int, stride: int, batch_size: int) -> None:
    config: Any = model.config
    if config.is_encoder_decoder or not model.can_generate():
        raise UserError(
            f"{type(model).__name__} gives no probability of a running text. Perplexity needs a decoder with a "
            "language-model head (AutoModelForCausalLM)."
        )
    longest = getattr(config, "max_position_embeddings", None)
    if window < 2 or (longest is not None and window > longest):
        limit = f" and at most the {longest} positions of the model" if longest is not None else ""
        raise UserError(f"window={window} must be at least 2{limit}.")
    if not 1 <= stride <= window:
        raise UserError(f"stride={stride} must lie between 1 and the window of {window}; leave it out for no overlap.")
    if batch_size < 1:
        raise UserError(f"batch_size={batch_size} must be at least 1.")


def _start(tokenizer: PreTrainedTokenizerBase, asked: bool | None) -> tuple[int, ...]:
    if asked is None:
        return frame_of(tokenizer).opening
    if asked and tokenizer.bos_token_id is None:
        raise UserError("start_token is set, but the tokenizer has no start token (bos_token). Leave it out.")
    return (int(tokenizer.bos_token_id),) if asked else ()


def _window_losses(model: PreTrainedModel, windows: Sequence[Window], batch_size: int) -> list[float]:
    """Mean loss of what each window scores."""
    losses: list[float] = []
    with evaluating(model):
        for group in _batches(windows, batch_size):
            batch = torch.stack([torch.from_numpy(one.ids) for one in group]).to(model.device)
            logits = model(input_ids=batch, use_cache=False).logits
            for row, (_, count) in enumerate(group):
                losses.append(summed_loss(logits[row, -count - 1 : -1], batch[row, -count:]) / count)
                if not losses[-1] < LARGEST:
                    raise UserError(
                        f"The loss of window {len(losses) - 1} is {losses[-1]}, so there is no finite perplexity. "
                        "Load the model in float32 or bfloat16; if that does not help, its weights are damaged."
                    )
    return losses


def _batches(windows: Sequence[Window], batch_size: int) -> Iterator[list[Window]]:
    """In order, and of one length each, so that nothing is padded."""
    for _, members in groupby(windows, key=lambda one: len(one.ids)):
        equal = list(members)
        for start in range(0, len(equal), batch_size):
            yield equal[start : start + batch_size]
