"""Scores of attentions, feed-forwards and layers as a table and as heat maps.

Reads the content of ``scores.json``, never a model. Missing numbers stay empty.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from apt_trainer.report.plots import STYLE
from apt_trainer.report.tables import markdown_table

ROWS = ("attention", "cross_attention", "mlp", "block")
TITLES = {"cosine": "cosine importance (1 − cosine)", "nri": "normalised relative impact"}
_MAP = "cividis"  # even in lightness, and the same for colour-blind readers


def scores_markdown(found: Mapping[str, Any]) -> str:
    """One row per unit, least harmful first by the first score that there is; whole layers after all others."""
    scored = [name for name in TITLES if any(unit.get(name) is not None for unit in found["units"])]
    order = sorted(found["units"], key=_place)
    columns: list[Any] = [("name", "unit", None)]
    columns += [(name, name, "{:.4g}".format) for name in scored]
    if "nri" in scored:
        columns += [("relative_impact", "relative impact", "{:.4g}".format), ("loss", found["loss_name"], _number)]
    columns += [("params", "parameters", "{:,.0f}".format), ("share", "share of blocks", "{:.2%}".format)]
    return markdown_table(order, columns)


def plot_scores(found: Mapping[str, Any], path: str | Path) -> None:
    """Draw the scores of every kind over the layers, and how alike the layers are, into one PNG file."""
    stacks = list(found["layers"])
    scored = [name for name in TITLES if any(unit.get(name) is not None for unit in found["units"])]
    alike = found.get("similarity") or {}
    heights = [len(_kinds(found, stack)) for stack in stacks for _ in scored] + ([9] if alike else [])
    with rc_context(STYLE):
        figure = Figure(figsize=(12, 1.6 + 0.62 * sum(heights)), dpi=120, layout="constrained")
        FigureCanvasAgg(figure)
        grid = figure.add_gridspec(len(heights), max(1, len(alike)), height_ratios=heights)
        row = 0
        for stack in stacks:
            for name in scored:
                axes = figure.add_subplot(grid[row, :])
                _draw_units(figure, axes, found, stack, name, f"{stack}: " if len(stacks) > 1 else "")
                row += 1
        for column, (stack, matrix) in enumerate(alike.items()):
            axes = figure.add_subplot(grid[row, column])
            draw_similarity(figure, axes, matrix, stack if len(alike) > 1 else "")
        figure.suptitle(
            f"What {Path(found['model']).name} can do without", fontsize=14, fontweight="bold", x=0.01, ha="left"
        )
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format="png")


def _place(unit: Mapping[str, Any]) -> tuple[bool, float]:
    return unit["kind"] == "block", math.inf if unit["rank"] is None else unit["rank"]


def _kinds(found: Mapping[str, Any], stack: str) -> list[str]:
    present = {unit["kind"] for unit in found["units"] if unit["stack"] == stack}
    return [kind for kind in ROWS if kind in present]


def _draw_units(figure: Figure, axes: Axes, found: Mapping[str, Any], stack: str, name: str, prefix: str) -> None:
    kinds = _kinds(found, stack)
    values = np.full((len(kinds), found["layers"][stack]), np.nan)
    for unit in found["units"]:
        value = unit.get(name)
        if unit["stack"] == stack and value is not None and math.isfinite(value):
            values[kinds.index(unit["kind"]), unit["layer"]] = value
    real = values[np.isfinite(values)]
    top = _top(real)
    image = axes.imshow(values, aspect="auto", cmap=_MAP, vmin=float(real.min()) if real.size else 0.0, vmax=top)
    for row, column in zip(*np.nonzero(np.isfinite(values)), strict=True):
        if values[row, column] > top:  # an outlier is told by its number, so that the rest keeps its colours
            axes.text(column, row, _short(values[row, column]), ha="center", va="center", fontsize=6)
    axes.set_yticks(range(len(kinds)), [kind.replace("_", "-") for kind in kinds])
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=16))
    axes.set_xlabel("layer")
    axes.set_title(f"{prefix}{TITLES[name]}; dark = can go")
    figure.colorbar(image, ax=axes, extend="max" if real.size and real.max() > top else "neither", pad=0.01)


def _top(values: np.ndarray) -> float:
    """Upper end of the colours: the largest value, or where it is far out, the largest that is not."""
    if not values.size:
        return 1.0
    low, high = np.percentile(values, (25, 75))
    near = values[values <= high + 3 * (high - low)]
    return float(near.max() if near.size else values.max())


def draw_similarity(figure: Figure, axes: Axes, matrix: Sequence[Sequence[float]], title: str) -> None:
    image = axes.imshow(np.asarray(matrix), cmap=_MAP, vmax=1.0)
    axes.set_anchor("W")
    axes.set_title(f"{title} mean cosine between inputs of layers".strip())
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("input of layer (last: output of the model's layers)")
    axes.set_ylabel("input of layer")
    figure.colorbar(image, ax=axes, pad=0.02)


def _number(value: float) -> str:
    return f"{value:.4g}"


def _short(value: float) -> str:
    """Two digits or three, so that numbers of neighbouring cells do not touch: 0.35, 68, 855, 2.7k, 936k."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.{int(value < 10 * size)}f}{letter}"
    return f"{value:.0f}" if value >= 10 else f"{value:.2g}"
