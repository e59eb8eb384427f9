"""A fast tokenizer as the ``tokenizer.*`` keys of a GGUF file."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from apt_trainer.errors import UserError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_DIGIT_TRIPLES = r"\p{N}{1,3}"
_LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"


class Nowhere:
    """A writer that writes nothing, to find out whether a tokenizer can be written."""

    def __getattr__(self, name: str) -> Callable[[object], None]:
        return lambda value: None


def add_tokenizer(writer: Any, tokenizer: Any, config: Any) -> None:
    """Write ``tokenizer`` with ``config.vocab_size`` tokens; without one the file has none and takes token ids only.

    Raises:
        UserError: it is no byte-level or byte-fallback BPE, or splits text in a way that llama.cpp has no name for.
    """
    if tokenizer is None:
        writer.add_tokenizer_model("no_vocab")
        return
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(
            f"{type(tokenizer).__name__} is a slow tokenizer, which GGUF has no form for. Load a fast one."
        )
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    model = described["model"]
    if model["type"] != "BPE":
        raise UserError(
            f"The tokenizer is {model['type']}; only BPE can be written as GGUF. Serve the folder with transformers."
        )
    tokens, types = _tokens(tokenizer, described, config.vocab_size)
    if model.get("byte_fallback"):
        ranks = {"".join(pair): rank for rank, pair in enumerate(_merges(model))}
        writer.add_tokenizer_model("llama")
        writer.add_token_list(tokens)
        writer.add_token_scores([-float(ranks[token]) if token in ranks else -1e6 for token in tokens])
        writer.add_add_space_prefix(_adds_space(tokenizer))
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_splitting(described))
        writer.add_token_list(tokens)
        writer.add_token_merges([" ".join(pair) for pair in _merges(model)])
    writer.add_token_types(types)
    for name in ("bos", "eos", "unk", "pad"):
        number = getattr(tokenizer, f"{name}_token_id", None)
        if number is not None:
            getattr(writer, f"add_{name}_token_id")(number)
    ids = tokenizer("a").input_ids
    writer.add_add_bos_token(bool(ids) and ids[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(bool(ids) and ids[-1] == tokenizer.eos_token_id and len(ids) > 1)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def _tokens(tokenizer: Any, described: dict[str, Any], number: int) -> tuple[list[str], list[int]]:
    """Tokens and their types by id; ids that the tokenizer lacks are filled up."""
    tokens = [f"[PAD{i}]" for i in range(number)]
    types = [UNUSED] * number
    for token, i in tokenizer.get_vocab().items():
        if i < number:
            tokens[i], types[i] = token, BYTE if _BYTE.fullmatch(token) else NORMAL
    for added in described.get("added_tokens", ()):
        if added["id"] < number:
            types[added["id"]] = CONTROL if added["special"] else USER_DEFINED
    if described["model"].get("byte_fallback") and tokenizer.unk_token_id is not None:
        types[tokenizer.unk_token_id] = UNKNOWN
    return tokens, types


def _merges(model: dict[str, Any]) -> list[tuple[str, str]]:
    pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    return [(left, right) for left, right in pairs]


def _adds_space(tokenizer: Any) -> bool:
    return bool(tokenizer.convert_ids_to_tokens(tokenizer("a", add_special_tokens=False).input_ids[0]).startswith("▁"))


def _splitting(described: dict[str, Any]) -> str:
    """Name that llama.cpp has for the way in which text is split before merges."""
    splitter = described.get("pre_tokenizer") or {}
    steps = splitter.get("pretokenizers", [splitter])
    kinds = [step.get("type") for step in steps]
    patterns = [step["pattern"].get("Regex", "") for step in steps if step.get("type") == "Split"]
    if kinds == ["ByteLevel"]:
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and steps[0]["individual_digits"]:
        return "smollm"
    if len(patterns) == 1 and kinds == ["Split", "ByteLevel"] and _LETTERS in patterns[0]:
        if _DIGIT_TRIPLES in patterns[0]:
            return "llama-bpe"
        if r"|\p{N}|" in patterns[0]:
            return "qwen2"
    raise UserError(
        "The tokenizer splits text in a way that is none of those known here (gpt-2, smollm, llama-bpe, qwen2). "
        "Serve the folder with transformers."
    )
