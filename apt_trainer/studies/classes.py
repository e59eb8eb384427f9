"""Layers that do the same work: a beginning, a middle and an end, told apart by how alike their inputs are.

The papers on layers as painters draw these by eye; the rule here is ours. Not a score: nothing is dropped by it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class LayerClasses(NamedTuple):
    """Numbers of layers; together all of them."""

    beginning: list[int]
    middle: list[int]
    ending: list[int]


def layer_classes(similarity: torch.Tensor, threshold: float = 0.5) -> LayerClasses:
    """Part the layers of a similarity matrix [layers + 1, layers + 1] (``cosine.CosineScores``).

    The middle is the run of layers round the centre whose output is at least ``threshold`` times as similar to that
    of the centre layer as the most similar other layer's is.
    """
    outputs = similarity[1:, 1:]
    layers = len(outputs)
    centre = layers // 2
    others = [i for i in range(layers) if i != centre]
    least = threshold * float(outputs[centre, others].max()) if others else 0.0
    first = last = centre
    while first > 0 and float(outputs[centre, first - 1]) >= least:
        first -= 1
    while last < layers - 1 and float(outputs[centre, last + 1]) >= least:
        last += 1
    return LayerClasses(list(range(first)), list(range(first, last + 1)), list(range(last + 1, layers)))
