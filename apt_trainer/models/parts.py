"""What a model weighs, by part: its blocks, its embeddings, its head and the rest, such as the last norm.

A tensor that two parts share, as tied embeddings and a head do, counts once, as embeddings. Not for what units cost
(``plan.cost``).
"""

from __future__ import annotations

from typing import Any, NamedTuple

from apt_trainer.models.family import ModelFamily
from apt_trainer.tensors.partitioned import numel_of

BLOCKS, EMBEDDINGS, HEAD, REST = "blocks", "embeddings", "head", "rest"


class Weight(NamedTuple):
    """Numbers of parameters and of bytes."""

    params: int
    bytes: int


def weigh_parts(model: Any, family: ModelFamily) -> dict[str, Weight]:
    """Part → what it weighs, adapters left out, also on the meta device; 0 for a part that ``model`` lacks."""
    blocks, embeddings = (
        tuple(f"{path}." for path in paths) for paths in (family.block_modules(model), family.embedding_modules(model))
    )
    head = model.get_output_embeddings()
    of_head = () if head is None else tuple(f"{path}." for path, module in model.named_modules() if module is head)
    sizes = {part: [0, 0] for part in (BLOCKS, EMBEDDINGS, HEAD, REST)}
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            continue
        if name.startswith(blocks):
            part = BLOCKS
        elif name.startswith(embeddings):
            part = EMBEDDINGS
        else:
            part = HEAD if name.startswith(of_head) or not name.startswith(family.prefix(model)) else REST
        sizes[part][0] += numel_of(parameter)
        sizes[part][1] += numel_of(parameter) * parameter.element_size()
    return {part: Weight(*size) for part, size in sizes.items()}
