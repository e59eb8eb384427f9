"""A model with the embeddings, and the outputs, of some of its tokens alone.

Rows are put into their new order, then transformers' ``resize_token_embeddings`` takes the rest off, which knows what
is tied to what. Not for the tokenizer's side (``tasks.vocabulary``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from apt_trainer.errors import UserError

_LISTS = ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids")


@torch.no_grad()
def cut_vocabulary(model: Any, kept: Sequence[int]) -> None:
    """Leave the tokens ``kept``, ids of the old vocabulary, whose places in it are their new ids.

    Raises:
        UserError: the model has no embeddings of so many tokens, or other ones beside them.
    """
    embeddings = model.get_input_embeddings()
    size = _check(model, embeddings, kept)
    index = torch.tensor(list(kept), device=embeddings.weight.device)
    for tensor, dim in list(_per_token(model, size)):
        tensor.narrow(dim, 0, len(kept)).copy_(tensor.index_select(dim, index))
    model.resize_token_embeddings(len(kept), mean_resizing=False)
    numbers = {old: new for new, old in enumerate(kept)}
    renumber_config(model.config, numbers, len(kept))
    if getattr(model, "generation_config", None) is not None:
        _renumber(model.generation_config, numbers)
    embeddings = model.get_input_embeddings()
    if embeddings.padding_idx is not None:
        embeddings.padding_idx = model.config.get_text_config().pad_token_id


def renumber_config(config: Any, numbers: Mapping[int, int], size: int) -> None:
    """Put the ids of a vocabulary of ``size`` tokens into ``config``; ``numbers``: old id → new."""
    for part in {id(part): part for part in (config, config.get_text_config())}.values():
        _renumber(part, numbers)
        part.vocab_size = size


def _check(model: Any, embeddings: Any, kept: Sequence[int]) -> int:
    """Size of the vocabulary."""
    size = embeddings.num_embeddings
    if max(kept) >= size:
        raise UserError(
            f"vocabulary: the tokenizer has the token {max(kept):,}, but the model has embeddings of {size:,} tokens. "
            "Give the tokenizer of this model."
        )
    others = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding)
        and module.num_embeddings == size
        and module.weight is not embeddings.weight
        and module.weight is not getattr(model.get_output_embeddings(), "weight", None)
    ]
    if others:
        raise UserError(
            f"vocabulary: {type(model).__name__} has further embeddings of each token ({', '.join(others)}), which "
            "are not cut. Leave vocabulary out."
        )
    return int(size)


def _per_token(model: Any, size: int) -> Iterator[tuple[torch.Tensor, int]]:
    """Tensors with a row for each token, or a column, and which of the two: embeddings, and what makes the outputs."""
    outputs, embeddings = model.get_output_embeddings(), model.get_input_embeddings().weight
    yield embeddings, 0
    if outputs is None:
        return
    if outputs.weight is not embeddings:
        yield outputs.weight, 0
    inside = {id(tensor) for tensor in (*model.base_model.parameters(), *model.base_model.buffers())}
    seen: set[int] = set()
    for tensor in (*model.parameters(), *model.buffers()):
        if id(tensor) in inside or id(tensor) in seen or tuple(tensor.shape) not in ((size,), (1, size)):
            continue
        seen.add(id(tensor))
        yield tensor, tensor.dim() - 1


def _renumber(config: Any, numbers: Mapping[int, int]) -> None:
    for name, value in list(vars(config).items()):
        if (name.endswith("_token_id") or name in _LISTS) and value is not None:
            setattr(config, name, _new(value, numbers))


def _new(value: Any, numbers: Mapping[int, int]) -> Any:
    """``value`` with new ids; what is gone is None, or left out of a list."""
    if isinstance(value, (list, tuple)):
        found = [_new(part, numbers) for part in value]
        return [part for part in found if part is not None and part != []]
    return numbers.get(value)
