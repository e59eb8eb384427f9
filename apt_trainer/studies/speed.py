"""How much faster a model is without some of its units: the cut copy beside the full model, in turns in one process.

Not for models that were saved (``benchmark``).
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Sequence
from typing import Any

from apt_trainer.measure import compare_generation, compare_latency
from apt_trainer.scoring.sublayers.drop import drop
from apt_trainer.scoring.sublayers.units import Unit, Units, find_units

LONGEST_PROMPT = 128


def composition(units: Units, dropped: Sequence[Unit]) -> list[str]:
    """What of the speed depends on: how many sublayers and heads of each kind go, as in ["3 attention", "1 mlp"]."""
    return [f"{count} {kind}" for kind, count in sorted(Counter(unit.kind for unit in units.parts(dropped)).items())]


def speedups(model: Any, units: Units, dropped: Sequence[Unit], length: int, new_tokens: int = 32) -> dict[str, float]:
    """Speed of the dense ``model`` without ``dropped`` over its own: :func:`relative_speed`."""
    small = copy.deepcopy(model)
    drop(small, find_units(small), dropped)
    return relative_speed(model, small, length, new_tokens)


def relative_speed(full: Any, small: Any, length: int, new_tokens: int = 32) -> dict[str, float]:
    """Speed of ``small`` over that of ``full``, at batch size 1; 1 is as fast.

    A model that generates has ``prefill``, ``decode`` (per token) and ``whole`` (a prompt of ``length`` tokens, but at
    most 128, then ``new_tokens``, or as many as it has positions), and ``cache``: bytes over those of the full one.
    Others have ``whole`` alone.
    """
    models, length = {"full": full, "small": small}, min(length, LONGEST_PROMPT)
    longest = getattr(full.config, "max_position_embeddings", None)
    if longest is not None:
        new_tokens = max(1, min(new_tokens, longest - length - 1))
    if not full.can_generate():
        timed = compare_latency(models, [1], length)
        return {"whole": timed["full"][1].median_ms / timed["small"][1].median_ms}
    before, after = (of_model[1] for of_model in compare_generation(models, [1], length, new_tokens).values())
    whole = [one.prefill.median_ms + new_tokens * one.decode.median_ms for one in (before, after)]
    return {
        "prefill": before.prefill.median_ms / after.prefill.median_ms,
        "decode": before.decode.median_ms / after.decode.median_ms,
        "whole": whole[0] / whole[1],
        "cache": after.cache_bytes / before.cache_bytes,
    }
