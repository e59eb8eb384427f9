"""Curves of drops as tables and as a figure: harm over the number of units, one line per ranking.

Reads the content of ``curve.json``, never a model. Missing numbers stay empty.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter, ScalarFormatter

from apt_trainer.report.plots import BLUE, GREEN, INK, ORANGE, PURPLE, STYLE
from apt_trainer.report.tables import Column, markdown_table

PLOT_FILE = "curve.png"
_COLOURS = (BLUE, ORANGE, GREEN, PURPLE, INK, "#B8860B", "#56B4E9", "#888888")
_MARKS = "osDv^x+*"
_WORST = 30.0  # times the loss of the full model that is still drawn; what is worse stands at the edge
_SPEEDS = ("prefill", "decode", "whole")
_CACHE = "bytes of the cache over those of the full model"
Found = Mapping[str, Any]
Row = Mapping[str, Any]


def curve_markdown(found: Found) -> str:
    """One table per kind of unit and measure (loss, tasks, speed, SDR, cache) that has numbers: a row per number of
    units, a column per ranking."""
    full = found["full"]
    timed = f"; speed timed on {found['timed_on']}" if "timed_on" in found else ""
    parts = [f"{Path(found['model']).name}, full model: {_of_full(found)}{timed}"]
    measures = [(found["loss_name"], lambda row: row["perplexity"], "{:.4g}".format)]
    measures += [(task, partial(_at, "tasks", task), "{:.3f}".format) for task in full["tasks"]]
    measures += [(f"speed-up ({name})", partial(_at, "speedup", name), "{:.2f}".format) for name in _SPEEDS]
    measures += [("SDR", lambda row: row.get("sdr"), "{:.3f}".format)]
    measures += [("relative SDR", lambda row: row.get("sdr_relative"), "{:.3f}".format)]
    measures += [(_CACHE, partial(_at, "speedup", "cache"), "{:.1%}".format)]
    for kind in _distinct(found, "kind"):
        rows = [row for row in found["rows"] if row["kind"] == kind]
        rankings = _distinct({"rows": rows}, "ranking")
        absent = [name for name in _distinct(found, "ranking") if name not in rankings]
        note = f" (not ranked by {', '.join(absent)})" if absent else ""
        for title, value, form in measures:
            lines = _pivot(rows, value)
            if lines:
                columns: list[Column] = [("count", "units", None), ("share", "of block parameters", "{:.1%}".format)]
                columns += [(name, name, form) for name in rankings]
                parts += [f"{title} without units of kind {kind}{note}", markdown_table(lines, columns)]
    return "\n\n".join(parts)


def plot_curve(found: Found, folder: str | Path) -> list[str]:
    """Draw the losses into a PNG file in ``folder``; returns its name.

    A panel per kind, and where there are several, before them one that compares them at equal parameters, each kind by
    its best ranking.
    """
    kinds = _distinct(found, "kind")
    together = len(kinds) > 1
    with rc_context(STYLE):
        figure = Figure(figsize=(3.6 * (len(kinds) + together) + 1.2, 4.2), layout="constrained")
        FigureCanvasAgg(figure)
        panels = list(figure.subplots(1, len(kinds) + together, sharey=True, squeeze=False)[0])
        panels[0].set_ylabel(found["loss_name"])
        if together:
            _draw_at_equal_parameters(panels.pop(0), found, kinds)
        for axes, kind in zip(panels, kinds, strict=True):
            _draw(axes, found, kind)
        lines = {line.get_label(): line for axes in panels for line in axes.get_lines()}  # one per ranking
        panels[-1].legend(lines.values(), lines.keys(), loc="center left", bbox_to_anchor=(1.0, 0.5))
        figure.savefig(Path(folder) / PLOT_FILE, format="png", dpi=120)
    return [PLOT_FILE]


def _draw(axes: Axes, found: Found, kind: str) -> None:
    whole = found["full"]["perplexity"]
    top = whole * _WORST
    for i, ranking in enumerate(_distinct(found, "ranking")):
        rows = [row for row in found["rows"] if (row["kind"], row["ranking"]) == (kind, ranking)]
        if not rows:
            continue
        counts = [0, *(row["count"] for row in rows)]
        means = [whole, *(_clipped(row["loss"], top) for row in rows)]
        colour, mark = _COLOURS[i % len(_COLOURS)], _MARKS[i % len(_MARKS)]
        axes.plot(counts, means, color=colour, marker=mark, markersize=4, linewidth=1.4, label=ranking)
        if any(row["seeds"] > 1 for row in rows):
            ends = [[_clipped(loss, top) for loss in row["losses"]] for row in rows]
            low, high = [whole, *map(min, ends)], [whole, *map(max, ends)]
            axes.fill_between(counts, low, high, color=colour, alpha=0.15, linewidth=0)
    _scale(axes, whole, top)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title(kind)
    axes.set_xlabel("units dropped")


def _draw_at_equal_parameters(axes: Axes, found: Found, kinds: Sequence[str]) -> None:
    whole = found["full"]["perplexity"]
    top = whole * _WORST
    for i, kind in enumerate(kinds):
        points = best_by_share([row for row in found["rows"] if row["kind"] == kind])
        shares, losses = [0.0, *(100 * share for share, _ in points)], [whole, *(_clipped(y, top) for _, y in points)]
        axes.plot(shares, losses, color=_COLOURS[-1 - i], marker=_MARKS[i], markersize=4, linewidth=1.4, label=kind)
    _scale(axes, whole, top)
    axes.legend(loc="upper left", fontsize="small")
    axes.set_title("kinds, each by its best ranking")
    axes.set_xlabel("% of block parameters dropped")


def best_by_share(rows: Sequence[Row]) -> list[tuple[float, float]]:
    """(share of the block parameters, loss) of every drop that no other beats in both, in order of shares."""
    drops = [(row["parameter_share"], row["loss"]) for row in rows if row["loss"] is not None]
    best: list[tuple[float, float]] = []
    for share, loss in sorted(drops, key=lambda drop: (-drop[0], drop[1])):
        if not best or loss < best[-1][1]:
            best.append((share, loss))
    return best[::-1]


def _scale(axes: Axes, whole: float, top: float) -> None:
    axes.set_yscale("log")
    axes.set_ylim(whole * 0.9, top * 1.05)
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_minor_formatter(NullFormatter())


def _clipped(loss: float | None, top: float) -> float:
    return top if loss is None else min(top, math.exp(loss))


def _of_full(found: Found) -> str:
    full = found["full"]
    return ", ".join(
        [f"{found['loss_name']} {full['perplexity']:.4g}", *(f"{t} {v:.3f}" for t, v in full["tasks"].items())]
    )


def _distinct(found: Found, key: str) -> list[str]:
    return list(dict.fromkeys(row[key] for row in found["rows"]))


def _at(group: str, name: str, row: Row) -> float | None:
    value: float | None = row.get(group, {}).get(name)
    return value


def _pivot(rows: Sequence[Row], value_of: Callable[[Row], float | None]) -> list[dict[str, Any]]:
    """One line per count that has a number; ``share`` is that of the first ranking."""
    lines: dict[int, dict[str, Any]] = {}
    for row in rows:
        value = value_of(row)
        if value is not None:
            line = lines.setdefault(row["count"], {"count": row["count"], "share": row["parameter_share"]})
            line[row["ranking"]] = value
    return [lines[count] for count in sorted(lines)]
