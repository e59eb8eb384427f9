"""A fast tokenizer with fewer tokens, which still encodes any text, and every text whose tokens it kept as before.

WordPiece takes the longest token that fits, and Unigram the most probable split: both find the split they found, as
long as its tokens are there. BPE gets from characters to a token by merges, so the tokens on the way stay too. Special
and added tokens stay, and what any text can be spelled with: bytes, or single characters where there are none. Not
for the model's side (``surgery.vocabulary``).
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from apt_trainer.errors import UserError

KINDS = ("BPE", "Unigram", "WordLevel", "WordPiece")
TOKENIZER_FILE = "tokenizer.json"
_CONFIG_FILE = "tokenizer_config.json"
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")


def check_tokenizer(tokenizer: Any) -> None:
    """Raise :class:`UserError` for a tokenizer that cannot be cut."""
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(
            f"vocabulary: {type(tokenizer).__name__} is no fast tokenizer, so its tokens cannot be taken out. Use a "
            f"model that comes with a {TOKENIZER_FILE}, or leave vocabulary out."
        )
    kind = _state(tokenizer)["model"]["type"]
    if kind not in KINDS:
        raise UserError(
            f"vocabulary: the tokenizer's model is {kind}. What can be cut: {', '.join(KINDS)}. Leave vocabulary out."
        )


def choose_tokens(tokenizer: Any, counts: Mapping[int, int], size: int | None = None) -> list[int]:
    """Ids that stay, ascending: those in ``counts``, id → how often it occurs, and all that have to.

    With ``size``, the most frequent ones only, so that there are not more in all.

    Raises:
        UserError: ``size`` is less than what has to stay, or the tokenizer is of another kind.
    """
    check_tokenizer(tokenizer)
    state = _state(tokenizer)
    tokens = _tokens(state)
    kept = _required(state, tokens)
    ways = _Merges(state["model"], tokens) if state["model"]["type"] == "BPE" else None
    if ways is not None:
        for number in list(kept):
            kept |= ways.to(number)
    if size is not None and size < len(kept):
        raise UserError(
            f"vocabulary={size}: special tokens and what any text is spelled with are {len(kept):,} tokens of this "
            f"tokenizer. Give at least that many, or vocabulary: used."
        )
    for number in sorted((n for n in counts if n in tokens), key=lambda n: (-counts[n], n)):
        new = ({number} if ways is None else ways.to(number)) - kept
        if size is None or len(kept) + len(new) <= size:
            kept |= new
    return sorted(kept)


def cut_tokenizer(tokenizer: Any, kept: Sequence[int]) -> Any:
    """A tokenizer of the same class with the tokens ``kept`` alone, the k-th of which gets the id k."""
    state = _state(tokenizer)
    numbers = {old: new for new, old in enumerate(kept)}
    model = state["model"]
    if isinstance(model["vocab"], Mapping):
        model["vocab"] = {token: numbers[old] for token, old in model["vocab"].items() if old in numbers}
    else:
        model["vocab"] = [entry for old, entry in enumerate(model["vocab"]) if old in numbers]
    if model.get("unk_id") is not None:
        model["unk_id"] = numbers[model["unk_id"]]
    if "merges" in model:
        model["merges"] = [
            merge
            for merge in model["merges"]
            if {*_pair(merge), _joined(*_pair(merge), model)} <= model["vocab"].keys()
        ]
    for added in state["added_tokens"]:
        added["id"] = numbers[added["id"]]
    if state.get("padding"):
        state["padding"]["pad_id"] = numbers[state["padding"]["pad_id"]]
    _renumber(state.get("post_processor"), numbers)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        for file in Path(folder).iterdir():
            if file.name not in (TOKENIZER_FILE, _CONFIG_FILE) and file.suffix != ".jinja":
                file.unlink()  # the vocabulary in another format, which would be read instead
        (Path(folder) / TOKENIZER_FILE).write_text(json.dumps(state, ensure_ascii=False), encoding="utf-8")
        config = json.loads((Path(folder) / _CONFIG_FILE).read_text(encoding="utf-8"))
        config.pop("added_tokens_decoder", None)
        (Path(folder) / _CONFIG_FILE).write_text(json.dumps(config, ensure_ascii=False), encoding="utf-8")
        return AutoTokenizer.from_pretrained(folder)


def _state(tokenizer: Any) -> dict[str, Any]:
    return json.loads(tokenizer.backend_tokenizer.to_str())  # type: ignore[no-any-return]


def _tokens(state: Mapping[str, Any]) -> dict[int, str]:
    """id → token, added ones included."""
    vocabulary = state["model"]["vocab"]
    if isinstance(vocabulary, Mapping):
        tokens = {number: token for token, number in vocabulary.items()}
    else:
        tokens = {number: token for number, (token, _) in enumerate(vocabulary)}
    return tokens | {added["id"]: added["content"] for added in state["added_tokens"]}


def _required(state: Mapping[str, Any], tokens: Mapping[int, str]) -> set[int]:
    """Ids of added tokens, of the unknown one, and of what any text can be spelled with."""
    model = state["model"]
    kept = {added["id"] for added in state["added_tokens"]}
    kept |= {number for number, token in tokens.items() if token == model.get("unk_token") or _BYTE.fullmatch(token)}
    if model.get("unk_id") is not None:
        kept.add(model["unk_id"])
    if model["type"] == "Unigram":  # what an unknown character costs is counted from the least of all scores
        kept.add(min(range(len(model["vocab"])), key=lambda number: model["vocab"][number][1]))
    if not model.get("byte_fallback"):
        prefix, suffix = _affixes(model)
        for number, token in tokens.items():
            if len(token.removeprefix(prefix).removesuffix(suffix)) == 1:
                kept.add(number)
    return kept


class _Merges:
    """How BPE gets from characters to each of its tokens."""

    def __init__(self, model: Mapping[str, Any], tokens: Mapping[int, str]) -> None:
        self._model, self._tokens = model, tokens
        self._ranks = {_pair(merge): rank for rank, merge in enumerate(model["merges"])}

    def to(self, number: int) -> set[int]:
        """``number`` and the ids of all tokens on the way to it. Within a longer word the way is the same: a merge
        across its ends would have been the end of it."""
        numbers, passed = self._model["vocab"], {number}
        parts = self._characters(self._tokens[number])
        passed |= {numbers[part] for part in parts if part in numbers}
        while len(parts) > 1:
            ranks = [self._ranks.get(pair, len(self._ranks)) for pair in zip(parts, parts[1:], strict=False)]
            place = min(range(len(ranks)), key=ranks.__getitem__)
            if ranks[place] == len(self._ranks):
                break
            parts[place : place + 2] = [_joined(parts[place], parts[place + 1], self._model)]
            passed.add(numbers[parts[place]])
        return passed

    def _characters(self, token: str) -> list[str]:
        prefix, suffix = _affixes(self._model)
        starts = not (prefix and token.startswith(prefix))
        ends = bool(suffix) and token.endswith(suffix)
        parts = list(token.removeprefix(prefix).removesuffix(suffix) if ends else token.removeprefix(prefix))
        parts = [part if starts and place == 0 else prefix + part for place, part in enumerate(parts)]
        return [*parts[:-1], parts[-1] + suffix] if ends and parts else parts


def _pair(merge: str | Sequence[str]) -> tuple[str, str]:
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


def _joined(left: str, right: str, model: Mapping[str, Any]) -> str:
    return left + right.removeprefix(_affixes(model)[0])


def _affixes(model: Mapping[str, Any]) -> tuple[str, str]:
    """What begins a token within a word, and what ends one at its end."""
    return model.get("continuing_subword_prefix") or "", model.get("end_of_word_suffix") or ""


def _renumber(processor: Any, numbers: Mapping[int, int]) -> None:
    """Put the new ids into a post-processor."""
    if processor is None:
        return
    for part in processor.get("processors", ()):
        _renumber(part, numbers)
    special = processor.get("special_tokens")
    for token in special.values() if isinstance(special, Mapping) else ():
        token["ids"] = [numbers[old] for old in token["ids"]]
    for name in ("sep", "cls"):
        if name in processor:
            processor[name] = [processor[name][0], numbers[processor[name][1]]]


def count_tokens(rows: Iterable[Iterable[int]]) -> dict[int, int]:
    """How often each id occurs in ``rows``; ids below 0, which mark what is ignored, are left out."""
    counts: dict[int, int] = {}
    for row in rows:
        for number in row:
            if number >= 0:
                counts[number] = counts.get(number, 0) + 1
    return counts
