"""Windows of running text as a decoder reads them: the one place that cuts texts for training, scoring and measuring.

A model whose tokenizer puts a start token before every text (Gemma, LLaMA) has seen no text without it, and is far off
when it gets one: so every window begins with it, as each document of lm-evaluation-harness does. Where a tokenizer
adds none, windows have none, and the first token of a window that follows no other is context alone. Not for batches,
labels or chat templates.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from tokenizers.processors import TemplateProcessing

_PROBE = "a"


class Frame(NamedTuple):
    """Tokens that a tokenizer puts before and behind every text, as ``<s>`` and ``</s>``."""

    opening: tuple[int, ...]
    closing: tuple[int, ...]


class Window(NamedTuple):
    """``ids``: [tokens] int64; ``scored``: how many of them, from the end, this window predicts and none before."""

    ids: np.ndarray
    scored: int


def frame_of(tokenizer: Any) -> Frame:
    """What ``tokenizer`` adds, tried out, since settings and post-processors of tokenizers say it in many ways."""
    bare, whole = plain_ids(tokenizer, _PROBE), list(tokenizer(_PROBE, verbose=False)["input_ids"])
    starts = [i for i in range(len(whole)) if whole[i : i + len(bare)] == bare]
    if not bare or not starts:
        return Frame((), ())
    return Frame(tuple(whole[: starts[0]]), tuple(whole[starts[0] + len(bare) :]))


def without_closing(tokenizer: Any) -> Any:
    """``tokenizer``, or where it puts something behind every text, a copy that does not: for a text to go on with."""
    frame = frame_of(tokenizer)
    if not frame.closing:
        return tokenizer
    changed = copy.deepcopy(tokenizer)
    names = changed.convert_ids_to_tokens(list(frame.opening))
    pairs = list(dict(zip(names, frame.opening, strict=True)).items())
    changed.backend_tokenizer.post_processor = TemplateProcessing([*names, "$A"], [*names, "$A", "$B:1"], pairs)
    return changed


def plain_ids(tokenizer: Any, text: str) -> list[int]:
    """Token ids of ``text`` alone, however long."""
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def framed_once(ids: list[int], frame: Frame) -> list[int]:
    """``ids`` with the special tokens of ``frame`` once: a text that was written with them has them twice."""
    before, behind = len(frame.opening), len(frame.closing)
    if before and ids[: 2 * before] == [*frame.opening, *frame.opening]:
        ids = ids[before:]
    if behind and ids[-2 * behind :] == [*frame.closing, *frame.closing]:
        ids = ids[:-behind]
    return ids


def cut(
    tokens: Sequence[int] | np.ndarray, length: int, opening: Sequence[int] = (), stride: int | None = None
) -> Iterator[Window]:
    """Windows of ``length`` tokens; the last one has what is left.

    Args:
        tokens: One running text.
        length: Tokens per window, ``opening`` included; more than ``opening`` has.
        opening: What each window begins with, if the text there does not begin with it anyway.
        stride: Tokens of the text from the start of one window to that of the next; default: no overlap. Then each
            token is still predicted once, from at least ``length`` - ``stride`` tokens.

    Yields:
        Windows that predict something. Without ``opening`` and overlap the first token of each is context only.
    """
    text, head = np.asarray(tokens, dtype=np.int64), np.asarray(opening, dtype=np.int64)
    start = end = 0
    while end < len(text):
        opens_itself = len(head) > 0 and np.array_equal(text[start : start + len(head)], head)
        body = length if opens_itself else length - len(head)
        part = text[start : start + body]
        ids = part if opens_itself else np.concatenate([head, part])
        scored = min(start + len(part) - end, len(ids) - max(1, len(head)))
        if scored > 0:
            yield Window(ids, scored)
        end = start + len(part)
        start += min(stride or body, body)
