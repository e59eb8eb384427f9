"""Which teacher layers are compared this step, and which student layer meets each of them.

Not for the distance itself (``distillation.losses``). Source: APT, Sec. 4.4; the blocks here fit any number of layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch

from apt_trainer.distillation.losses import Transform, hidden_distance
from apt_trainer.errors import unknown_choice
from apt_trainer.settings import CHOICES


def sample_teacher_layers(num_layers: int, num_blocks: int, seed: int, step: int, mode: str) -> tuple[int, ...]:
    """One layer, in [0, num_layers), from each of min(num_blocks, num_layers) consecutive blocks, in order.

    Blocks differ by at most one layer. ``mode`` dynamic: a random layer of each; static: the last of each; none: no
    layer at all. Depends on nothing but the arguments, so that processes agree and a resumed run continues.
    """
    if mode not in CHOICES["distillation_layer_map"]:
        raise unknown_choice("distillation_layer_map", mode, CHOICES["distillation_layer_map"])
    if mode == "none":
        return ()
    num_blocks = min(num_blocks, num_layers)
    edges = [block * num_layers // num_blocks for block in range(num_blocks + 1)]
    if mode == "static":
        return tuple(end - 1 for end in edges[1:])
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    drawn = torch.rand(num_blocks, generator=generator, dtype=torch.float64).tolist()
    return tuple(
        start + int(share * (end - start)) for (start, end), share in zip(pairwise(edges), drawn, strict=True)
    )


def match_layers(
    teacher_layers: Sequence[int],
    alive: Sequence[bool],
    student_hidden: Sequence[torch.Tensor],
    teacher_hidden: Sequence[torch.Tensor],
    transform: Transform,
    mask: torch.Tensor | None = None,
    normalise: bool = False,
) -> list[tuple[int, int]]:
    """Pairs of (student layer, teacher layer).

    Teacher layer i meets student layer i where that is ``alive`` (has both sublayers); else the nearest alive one
    below or above, whichever is closer now by ``hidden_distance`` (the lower one on a tie); it is skipped where no
    layer is alive. With another number of teacher layers, i stands for the same relative depth. The device is waited
    for once at most, and only where there are two to choose from.
    """
    assert len(alive) == len(student_hidden)
    pairs: list[tuple[int, int]] = []
    choices: list[tuple[int, int]] = []  # (position in pairs, layer above that competes)
    for teacher_layer in teacher_layers:
        candidates = _candidates(_same_depth(teacher_layer, len(teacher_hidden), len(alive)), alive)
        if len(candidates) == 2:
            choices.append((len(pairs), candidates[1]))
        if candidates:
            pairs.append((candidates[0], teacher_layer))
    if choices:
        for (position, above), closer in zip(
            choices,
            _above_is_closer(pairs, choices, student_hidden, teacher_hidden, transform, mask, normalise),
            strict=True,
        ):
            if closer:
                pairs[position] = (above, pairs[position][1])
    return pairs


def _same_depth(layer: int, num_from: int, num_to: int) -> int:
    """Layer of ``num_to`` at the relative depth of ``layer`` in ``num_from``; itself where both are equal."""
    return -(-(layer + 1) * num_to // num_from) - 1


def _candidates(layer: int, alive: Sequence[bool]) -> list[int]:
    """The layer itself, or the nearest alive one below and above it, where there are such."""
    if alive[layer]:
        return [layer]
    below = [i for i in range(layer) if alive[i]]
    above = [i for i in range(layer + 1, len(alive)) if alive[i]]
    return below[-1:] + above[:1]


@torch.no_grad()
def _above_is_closer(
    pairs: Sequence[tuple[int, int]],
    choices: Sequence[tuple[int, int]],
    student_hidden: Sequence[torch.Tensor],
    teacher_hidden: Sequence[torch.Tensor],
    transform: Transform,
    mask: torch.Tensor | None,
    normalise: bool,
) -> list[bool]:
    """Per choice, whether the layer above is closer to the teacher's than the one below that ``pairs`` names."""
    differences = []
    for position, above in choices:
        below, teacher_layer = pairs[position]
        low, high = (
            hidden_distance(student_hidden[layer], teacher_hidden[teacher_layer], transform, mask, normalise)
            for layer in (below, above)
        )
        differences.append(low - high)
    return (torch.stack(differences) > 0).tolist()  # type: ignore[no-any-return]
