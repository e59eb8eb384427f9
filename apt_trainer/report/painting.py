"""Sweeps over execution plans as tables and as the figures of arXiv 2407.09298.

Reads the content of ``summary.json``, never a model. Missing numbers stay empty.
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
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, ScalarFormatter

from apt_trainer.report.plots import BLUE, GREEN, INK, ORANGE, PURPLE, STYLE
from apt_trainer.report.sublayers import draw_similarity
from apt_trainer.report.tables import markdown_table

Row = Mapping[str, Any]
Found = Mapping[str, Any]
_ORDER = ("looped_parallel", "random", "reverse", "parallel", "skip", "middle_repeat")
_LOOKS = {
    "looped_parallel": (PURPLE, "D"),
    "random": (GREEN, "o"),
    "reverse": (ORANGE, "s"),
    "parallel": (BLUE, "^"),
    "skip": (INK, "v"),
    "middle_repeat": ("#B8860B", "x"),
}
_PROBES = {"skip_one": ("without the layer", BLUE, "v"), "switch": ("switched with the next", ORANGE, "s")}
_DASHES = ("-", "--", ":", "-.")
_LOWEST = -0.3
"""Scores below are drawn at the edge: how much worse than guessing a plan is says little."""


def paint_markdown(found: Found) -> str:
    """Scores and losses by start layer, then by single layer, then those of plans from files."""
    parts = [f"{Path(found['model']).name}: {found['layers']} layers; " + _scale(found)]
    swept = _columns(found)
    for key, title in _measures(found):
        if swept:
            parts.append(f"{title}, by layers in the middle")
            parts.append(_pivot(found, key, swept, "affected", "middle"))
        probes = [(name, (name, None)) for name in _PROBES if _rows(found, name)]
        if probes:
            parts.append(f"{title}, by single layer")
            parts.append(_pivot(found, key, [(_PROBES[name][0], of) for name, of in probes], "layer", "layer"))
    given = [row for row in found["rows"] if row["method"] in ("full", "file")]
    columns: list[Any] = [("name", "plan", None), ("plan", "order of layers", None), ("median", "score", _score)]
    if any(row["perplexity"] is not None for row in given):
        columns.append(("perplexity", found["loss_name"], "{:.4g}".format))
    parts.append(markdown_table(given, columns))
    return "\n\n".join(parts)


def plot_paint(found: Found, folder: str | Path) -> list[str]:
    """Draw what was measured into PNG files in ``folder``; returns their names."""
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    figures = {
        "methods.png": (_draw_methods, bool(_columns(found))),
        "probes.png": (_draw_probes, any(_rows(found, name) for name in _PROBES)),
        "benchmarks.png": (_draw_benchmarks, len(found["benchmarks"]) > 1 and bool(_columns(found))),
        "loops.png": (_draw_loops, len({row["times"] for row in _rows(found, "looped_parallel")}) > 1),
        "similarity.png": (_draw_similarity, "similarity" in found),
    }
    drawn = [name for name, (_, wanted) in figures.items() if wanted]
    for name in drawn:
        with rc_context(STYLE):
            figure = figures[name][0](found)
            figure.savefig(place / name, format="png")
    return drawn


# ---------------------------------------------------------------------- tables


def _scale(found: Found) -> str:
    names = ", ".join(one["name"] for one in found["benchmarks"])
    return f"score = median over {names}; 0 is guessing, 1 the full model." if names else "no score: see the warnings."


def _measures(found: Found) -> list[tuple[str, str]]:
    """(key of a row, title) of what there is a table and a panel for."""
    measures = [("median", "Score")] if found["benchmarks"] else []
    if found["loss_name"] is not None:
        measures.append(("perplexity", found["loss_name"][0].upper() + found["loss_name"][1:]))
    return measures


def _columns(found: Found) -> list[tuple[str, tuple[str, int | None]]]:
    """(title, (method, times)) of every plan that changes the middle."""
    columns: list[tuple[str, tuple[str, int | None]]] = []
    for method in _ORDER:
        for times in sorted({row["times"] for row in _rows(found, method)}, key=lambda times: times or 0):
            title = method.replace("_", " ") + (f" ×{times}" if times is not None else "")
            columns.append((title, (method, times)))
    return columns


def _rows(found: Found, method: str) -> list[Row]:
    return [row for row in found["rows"] if row["method"] == method]


def _curve(found: Found, of: tuple[str, int | None], over: str) -> list[Row]:
    """Rows of one method (and number of loops), by what they are drawn over."""
    return sorted((row for row in _rows(found, of[0]) if row["times"] == of[1]), key=lambda row: row[over])


def _pivot(
    found: Found, key: str, columns: Sequence[tuple[str, tuple[str, int | None]]], over: str, title: str
) -> str:
    table: dict[int, dict[str, Any]] = {}
    for name, of in columns:
        for row in _curve(found, of, over):
            table.setdefault(row[over], {over: row[over]})[name] = row[key]
    form = _score if key == "median" else "{:.4g}".format
    return markdown_table(
        [table[value] for value in sorted(table)], [(over, title, str), *((name, name, form) for name, _ in columns)]
    )


def _score(value: float) -> str:
    return f"{value:.3f}"


# ---------------------------------------------------------------------- figures


def _new(found: Found, title: str, size: tuple[float, float]) -> Figure:
    figure = Figure(figsize=size, dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(f"{Path(found['model']).name}: {title}", fontsize=14, fontweight="bold", x=0.01, ha="left")
    return figure


def _panels(found: Found, title: str) -> tuple[Figure, list[tuple[Axes, str]]]:
    """A figure with a panel for scores and one for losses, as far as there are any."""
    measures = _measures(found)
    figure = _new(found, title, (6.5 * len(measures) + 1, 5.2))
    panels = []
    for place, (key, name) in enumerate(measures, start=1):
        axes = figure.add_subplot(1, len(measures), place)
        axes.grid(axis="y", color="#DDDDDD", lw=0.6)
        axes.set_axisbelow(True)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if key == "median":
            axes.set_title(f"Median score (0 = guessing, 1 = full; edge: {_LOWEST} or less)")
        else:
            axes.set_title(f"{name} (log scale; lower is better)")
        panels.append((axes, key))
    return figure, panels


def _finish(found: Found, axes: Axes, key: str) -> None:
    """Lines of the full model and of guessing, and a scale that keeps what matters apart."""
    full = next(row for row in found["rows"] if row["method"] == "full")
    if key == "median":
        axes.axhline(1, color="#888888", lw=1, ls=(0, (4, 3)), zorder=0)
        axes.axhline(0, color="#888888", lw=1, ls=(0, (1, 2)), zorder=0)
        low, high = axes.get_ylim()
        axes.set_ylim(max(low, _LOWEST), max(high, 1.05))
        return
    axes.axhline(full["perplexity"], color="#888888", lw=1, ls=(0, (4, 3)), zorder=0)
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    if high < 30 * low:
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
        axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_minor_formatter(NullFormatter())


def _values(rows: Sequence[Row], key: str) -> list[float]:
    values = [math.nan if row[key] is None else row[key] for row in rows]
    return [max(value, _LOWEST) for value in values] if key == "median" else values


def _draw_methods(found: Found) -> Figure:
    figure, panels = _panels(found, "the middle of the model, run in other ways")
    columns = _columns(found)
    loops = [times for _, (method, times) in columns if method == "looped_parallel"]
    for axes, key in panels:
        for title, (method, times) in columns:
            rows = _curve(found, (method, times), "affected")
            color, marker = _LOOKS[method]
            dash = _DASHES[loops.index(times) % len(_DASHES)] if times in loops else "-"
            x = [row["affected"] for row in rows]
            axes.plot(x, _values(rows, key), dash, marker=marker, ms=5, color=color, lw=1.7, label=title)
            if key == "median" and any(row["seeds"] > 1 for row in rows):
                ends = [[max(_LOWEST, math.nan if m is None else m) for m in row["medians"]] for row in rows]
                axes.fill_between(x, [min(e) for e in ends], [max(e) for e in ends], color=color, alpha=0.15, lw=0)
        _finish(found, axes, key)
        axes.set_xlabel(f"layers in the middle, of {found['layers']}")
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside lower left", ncols=min(8, len(columns)))
    return figure


def _draw_probes(found: Found) -> Figure:
    figure, panels = _panels(found, "one layer at a time")
    for axes, key in panels:
        for method, (label, color, marker) in _PROBES.items():
            rows = _curve(found, (method, None), "layer")
            if rows:
                x = [row["layer"] for row in rows]
                axes.plot(x, _values(rows, key), marker=marker, ms=5, color=color, lw=1.5, label=label)
        _finish(found, axes, key)
        axes.set_xlabel("layer")
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside lower left", ncols=2)
    return figure


def _draw_benchmarks(found: Found) -> Figure:
    columns = _columns(found)
    across = min(3, len(columns))
    down = math.ceil(len(columns) / across)
    figure = _new(found, "every benchmark (grey: median)", (4.6 * across + 1, 3.4 * down + 1))
    names = [one["name"] for one in found["benchmarks"]]
    colors = (BLUE, ORANGE, GREEN, PURPLE, "#B8860B", "#56B4E9")
    drawn: list[Axes] = []
    for place, (title, of) in enumerate(columns, start=1):
        first = drawn[0] if drawn else None
        axes = figure.add_subplot(down, across, place, sharex=first, sharey=first)
        drawn.append(axes)
        rows = _curve(found, of, "affected")
        x = [row["affected"] for row in rows]
        axes.plot(x, _values(rows, "median"), color="#BBBBBB", lw=5, zorder=1)
        for number, name in enumerate(names):
            values = [row["normalised"][name] for row in rows]
            y = [math.nan if value is None else max(value, _LOWEST) for value in values]
            dash = _DASHES[number // len(colors) % len(_DASHES)]
            axes.plot(x, y, dash, marker=".", color=colors[number % len(colors)], lw=1.3, label=name, zorder=2)
        axes.set_title(title)
        axes.grid(axis="y", color="#DDDDDD", lw=0.6)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if place > len(columns) - across:
            axes.set_xlabel("layers in the middle")
    for axes in drawn:  # after all of them, for they share one scale
        _finish(found, axes, "median")
    figure.legend(*drawn[0].get_legend_handles_labels(), loc="outside lower left", ncols=min(5, len(names)))
    return figure


def _draw_loops(found: Found) -> Figure:
    rows = _rows(found, "looped_parallel")
    key = "median" if found["benchmarks"] else "perplexity"
    times, sizes = sorted({row["times"] for row in rows}), sorted({row["affected"] for row in rows})
    values = np.full((len(times), len(sizes)), np.nan)
    for row in rows:
        if row[key] is not None:
            values[times.index(row["times"]), sizes.index(row["affected"])] = row[key]
    figure = _new(found, "looped parallel", (1.2 + 0.62 * max(len(sizes), 8), 2.2 + 0.5 * len(times)))
    axes = figure.add_subplot()
    shown = np.maximum(values, _LOWEST) if key == "median" else np.log(values)
    image = axes.imshow(shown, aspect="auto", cmap="cividis", origin="lower")
    best = np.argmax if key == "median" else np.argmin
    for column in range(len(sizes)):
        known = values[:, column]
        if np.isfinite(known).any():
            filler = -np.inf if key == "median" else np.inf
            axes.plot(column, best(np.where(np.isfinite(known), known, filler)), "o", mfc="none", mec="white", ms=11)
    axes.set_xticks(range(len(sizes)), [str(size) for size in sizes])
    axes.set_yticks(range(len(times)), [str(number) for number in times])
    axes.set_xlabel("layers side by side")
    axes.set_ylabel("times")
    what = "median score" if key == "median" else f"log {found['loss_name']}"
    axes.set_title(f"{what}; ring = best number of times")
    figure.colorbar(image, ax=axes, pad=0.01)
    return figure


def _draw_similarity(found: Found) -> Figure:
    figure = _new(found, "how alike the layers are", (8, 6.6))
    axes = figure.add_subplot()
    draw_similarity(figure, axes, found["similarity"], "")
    classes = found["layer_classes"]
    for edge in (len(classes["beginning"]), len(classes["beginning"]) + len(classes["middle"])):
        if 0 < edge < found["layers"]:  # lines after the input of the first layer of a class
            axes.axvline(edge + 0.5, color="white", lw=1, ls="--")
            axes.axhline(edge + 0.5, color="white", lw=1, ls="--")
    return figure
