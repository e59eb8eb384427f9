"""One picture of a run: what was removed when, the losses, the adapter ranks, and what is left of each layer.

Reads the records of a run, never a model. Uses :class:`matplotlib.figure.Figure` directly, so that no global state or
window system is involved. Colours: Okabe and Ito, "Color Universal Design" (2008), safe for colour-blind readers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator, PercentFormatter

BLUE, ORANGE, GREEN, PURPLE, INK, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#333333", "#E4E4E4"
PHASE_TINTS = ("#F4F4F4", "#FDF0DC", "#E6F1F8", "#E6F4EE", "#F8EAF1", "#EFEFDC")
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888888",
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "figure.constrained_layout.h_pad": 0.08,
    "figure.constrained_layout.w_pad": 0.1,
}
NOT_A_TASK_METRIC = ("loss", "runtime", "per_second", "preparation_time")
_OLD_NAMES = {"loss/task": "task_loss", "loss/distillation": "distillation_loss"}
"""Of losses in logs of older runs."""
TUNE_NAMES = {
    "adapters": "adapters train",
    "adapters_and_norms": "adapters and norms train",
    "full": "all weights train",
}


class Phase(NamedTuple):
    """Steps from ``start`` to ``end`` of one kind."""

    start: float
    end: float
    label: str


def plot_run(
    events: Sequence[dict[str, Any]],
    log_history: Sequence[dict[str, Any]],
    path: str | Path | IO[bytes],
    title: str,
    *,
    metric: str | None = None,
    dpi: int = 120,
) -> None:
    """Draw a run into one PNG file.

    Args:
        events: Records of ``events.jsonl``, in order; may be empty (nothing was pruned).
        log_history: What the trainer logged: dicts with ``step`` and numbers.
        path: File to write, or what is open for that.
        title: Heading of the picture.
        metric: Logged evaluation metric to draw, with or without ``eval_``; default: the first that is no loss and
            no timing.
        dpi: Pixels per inch.
    """
    with rc_context(STYLE):
        figure = draw_run(events, log_history, title, metric=metric, dpi=dpi)
        if isinstance(path, str | Path):
            Path(path).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format="png")


def draw_run(
    events: Sequence[dict[str, Any]],
    log_history: Sequence[dict[str, Any]],
    title: str,
    *,
    metric: str | None = None,
    dpi: int = 120,
) -> Figure:
    """The figure of :func:`plot_run`."""
    last_step = max((float(entry.get("step", 0)) for entry in (*events, *log_history)), default=0.0)
    phases = find_phases(events, last_step)
    with rc_context(STYLE):
        figure = Figure(figsize=(13, _height(events)), dpi=dpi, layout="constrained")
        FigureCanvasAgg(figure)
        grid = figure.add_gridspec(3, 2, width_ratios=(3, 2))
        over_steps = [figure.add_subplot(grid[0, 0])]
        over_steps += [figure.add_subplot(grid[row, 0], sharex=over_steps[0]) for row in (1, 2)]
        for axes in over_steps:
            _shade(axes, phases)
            axes.set_xlim(0, last_step or 1)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.label_outer()
        _draw_sparsity(over_steps[0], events, last_step)
        _draw_losses(over_steps[1], log_history, metric)
        _draw_ranks(over_steps[2], events, last_step)
        over_steps[2].set_xlabel("optimizer step")
        _draw_layers(figure.add_subplot(grid[:, 1]), events)
        figure.suptitle(title, fontsize=14, fontweight="bold", x=0.01, ha="left")
        if phases:
            tints = [Patch(facecolor=tint, edgecolor="#BBBBBB", label=label) for label, tint in _tints(phases).items()]
            figure.legend(handles=tints, loc="outside lower left", ncols=len(tints))
    return figure


def find_phases(events: Sequence[dict[str, Any]], last_step: float) -> list[Phase]:
    """Cut a run at its first and last pruning and wherever what trains changes; fewer than two phases give none."""
    prunes = [float(e["step"]) for e in events if e["kind"] == "prune"]
    changes = [float(e["step"]) for e in events if e["kind"] == "phase"]
    cuts = sorted({0.0, *prunes[:1], *prunes[-1:], *changes, last_step}) if prunes or changes else []
    several = len({e.get("tune") for e in events}) > 1
    phases: list[Phase] = []
    for start, end in zip(cuts, cuts[1:], strict=False):
        label = ""
        if prunes:
            label = "warm-up" if start < prunes[0] else "pruning" if start < prunes[-1] else "recovery"
        if several:
            tune = ([e.get("tune") for e in events if e["step"] <= start] or [events[0].get("tune")])[-1]
            label += (": " if label else "") + TUNE_NAMES.get(str(tune), str(tune))
        if phases and phases[-1].label == label:
            phases[-1] = phases[-1]._replace(end=end)
        else:
            phases.append(Phase(start, end, label))
    return phases if len(phases) > 1 else []


def _draw_sparsity(axes: Axes, events: Sequence[dict[str, Any]], last_step: float) -> None:
    axes.set_title("Removed from the blocks")
    if not any(e["kind"] == "prune" for e in events):
        _say(axes, "no pruning")
        return
    steps, values = [0.0], [0.0]
    for event in events:
        steps.append(float(event["step"]))
        values.append(float(event["sparsity"]))
    axes.step([*steps, last_step], [*values, values[-1]], where="post", color=BLUE, lw=2)
    cuts = [(e["step"], e["sparsity"]) for e in events if e["kind"] == "prune"]
    teachers = [(e["step"], 0) for e in events if e["kind"] == "teacher"]  # on the axis, clear of the cuts
    for points, marker, color, label in ((cuts, "o", BLUE, "cut"), (teachers, "^", ORANGE, "new teacher")):
        if points:
            x, y = zip(*points, strict=True)
            axes.plot(
                x, y, marker, color=color, markeredgecolor="white", ms=8, ls="", label=label, zorder=3, clip_on=False
            )
    axes.annotate(
        f"{values[-1]:.1%}", (last_step, values[-1]), (-4, 5), textcoords="offset points", ha="right", weight="bold"
    )
    axes.set_ylim(0, max(values) * 1.22 or 1)
    axes.yaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=0))
    axes.set_ylabel("sparsity")
    axes.legend(loc="lower right", bbox_to_anchor=(1, 0.06))


def _draw_losses(axes: Axes, log_history: Sequence[dict[str, Any]], metric: str | None) -> None:
    axes.set_title("Losses")
    log_history = [{_OLD_NAMES.get(key, key): value for key, value in entry.items()} for entry in log_history]
    parts = {"task_loss": ("task", BLUE), "distillation_loss": ("distillation", PURPLE)}
    if not any(key in entry for entry in log_history for key in parts):
        parts = {"loss": ("training", BLUE)}
    parts["eval_loss"] = ("evaluation", GREEN)
    lines: list[Line2D] = []
    medians = []
    for key, (label, color) in parts.items():
        steps, values = _series(log_history, key)
        if key == "distillation_loss":  # exactly 0 where there is no distillation: a gap, not a value
            values = [value or math.nan for value in values]
        known = sorted(value for value in values if math.isfinite(value))
        if known:
            style: dict[str, Any] = (
                {"ls": "--", "marker": "."} if key == "eval_loss" else {"marker": "." if len(steps) < 30 else ""}
            )
            lines += axes.plot(steps, values, color=color, lw=1.5, label=label, **style)
            medians.append(known[len(known) // 2])
    if not lines:
        _say(axes, "no loss was logged")
        return
    if min(medians) > 0 and max(medians) > 20 * min(medians):
        axes.set_yscale("log")  # otherwise the smaller loss would be a flat line
    axes.set_ylabel("loss")
    score = _metric_key(log_history, metric)
    if score is not None:
        twin = axes.twinx()
        name = score.removeprefix("eval_").replace("_", " ")
        steps, values = _series(log_history, score)
        lines += twin.plot(steps, values, "s-", color=ORANGE, lw=1.5, ms=5, label=name, clip_on=False)
        twin.spines["right"].set_visible(True)
        twin.set_ylabel(name, color=ORANGE)
        twin.tick_params(axis="y", colors=ORANGE)
    axes.legend(handles=lines, loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0, ncols=len(lines))


def _draw_ranks(axes: Axes, events: Sequence[dict[str, Any]], last_step: float) -> None:
    axes.set_title("Adapter ranks")
    known = [(float(e["step"]), list(e["ranks"].values())) for e in events if e.get("ranks")]
    if not known:
        _say(axes, "no pruning" if not events else "no adapters")
        return
    merged = next((float(e["step"]) for e in events if e["step"] > known[-1][0] and e.get("ranks") == {}), None)
    steps = [step for step, _ in known] + [last_step if merged is None else merged]
    means = [sum(ranks) / len(ranks) for _, ranks in known]
    most = [float(max(ranks)) for _, ranks in known]
    means, most = [*means, means[-1]], [*most, most[-1]]
    axes.fill_between(steps, means, most, step="post", color=GREEN, alpha=0.12, lw=0)
    axes.step(steps, most, where="post", color=GREEN, lw=1.5, ls="--", label="largest")
    axes.step(steps, means, where="post", color=GREEN, lw=2, label="mean")
    if merged is not None:
        axes.annotate("merged", (merged, means[-1]), xytext=(6, 0), textcoords="offset points", va="center")
    axes.set_ylim(0, max(most) * 1.15)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylabel("rank")
    axes.legend(loc="lower right", ncols=2)


def _draw_layers(axes: Axes, events: Sequence[dict[str, Any]]) -> None:
    axes.set_title("What is left")
    dense, left = _sizes(events)
    if not dense:
        _say(axes, "no pruning")
        axes.set_xticks([])
        return
    bars = [("hidden", GREEN, left["hidden"], dense["hidden"], 0.0)] if dense.get("hidden") else []
    layers = sorted({*dense["heads"], *dense["neurons"]}, key=_natural)
    shown = [("heads", BLUE, -0.2), ("neurons", ORANGE, 0.2)]
    if "experts" in dense:
        shown = [("heads", BLUE, -0.27), ("neurons", ORANGE, 0.0), ("experts", PURPLE, 0.27)]
    for row, layer in enumerate(layers, start=1):
        for kind, color, shift in shown:
            if layer in dense.get(kind, ()):
                bars.append((kind, color, left[kind].get(layer, 0), dense[kind][layer], row + shift))
    counts_fit, size = len(layers) <= 48, 9 if len(layers) <= 12 else 7
    for kind, color, count, whole, y in bars:
        height = 0.62 if kind == "hidden" else 0.72 / len(shown)
        axes.barh(y, 1, height=height, color=GREY)
        axes.barh(y, count / whole if whole else 0, height=height, color=color)
        if counts_fit:
            axes.text(1.02, y, f"{count:,} / {whole:,}" if count else "gone", va="center", fontsize=size)
    every = math.ceil(len(layers) / 48)
    rows = [(row, f"layer {layer}") for row, layer in enumerate(layers, start=1) if (row - 1) % every == 0]
    axes.set_yticks([0, *(row for row, _ in rows)], ["hidden", *(label for _, label in rows)])
    axes.set_ylim(max(len(layers), 4) + 0.6, -0.6)  # few layers: no giant bars
    axes.set_xlim(0, 1.3 if counts_fit else 1)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "25 %", "50 %", "75 %", "100 %"])
    axes.set_xlabel("share of the dense model (grey)")
    axes.tick_params(axis="y", length=0)
    axes.spines[["left", "bottom"]].set_visible(False)
    handles = [Patch(color=color, label=kind) for kind, color, _ in shown]
    axes.legend(handles=handles, loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0, ncols=len(shown))


def _sizes(events: Sequence[dict[str, Any]]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Sizes of the dense model and those of the last record; both empty where nothing was pruned."""
    pruned = any(e["kind"] == "prune" for e in events)
    sized = [e for e in events if pruned and e.get("dense")]
    return (sized[-1]["dense"], sized[-1]) if sized else ({}, {})


def _height(events: Sequence[dict[str, Any]]) -> float:
    """Inches, so that the bars of many layers stay legible."""
    dense, _ = _sizes(events)
    return min(16.0, max(8.5, 1.5 + 0.42 * len(dense.get("heads", {}))))


def _series(log_history: Sequence[dict[str, Any]], key: str) -> tuple[list[float], list[float]]:
    """Steps and finite values of one logged key."""
    points = [(float(entry["step"]), float(entry[key])) for entry in log_history if entry.get(key) is not None]
    points = [point for point in points if math.isfinite(point[1])]
    return [step for step, _ in points], [value for _, value in points]


def _metric_key(log_history: Sequence[dict[str, Any]], metric: str | None) -> str | None:
    keys = [key for entry in log_history for key in entry if key.startswith("eval_")]
    if metric is not None:
        wanted = f"eval_{metric.removeprefix('eval_')}"
        return wanted if wanted in keys else None
    return next((key for key in keys if not key.endswith(NOT_A_TASK_METRIC)), None)


def _shade(axes: Axes, phases: Sequence[Phase]) -> None:
    tints = _tints(phases)
    for phase in phases:
        axes.axvspan(phase.start, phase.end, color=tints[phase.label], lw=0, zorder=0)
    axes.grid(axis="y", color="#DDDDDD", lw=0.6)
    axes.set_axisbelow(True)


def _tints(phases: Sequence[Phase]) -> dict[str, str]:
    labels = dict.fromkeys(phase.label for phase in phases)
    return {label: PHASE_TINTS[i % len(PHASE_TINTS)] for i, label in enumerate(labels)}


def _say(axes: Axes, message: str) -> None:
    axes.text(0.5, 0.5, message, ha="center", va="center", transform=axes.transAxes, color="#777777", fontsize=12)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.set_facecolor("#FAFAFA")


def _natural(layer: str) -> list[tuple[int, str]]:
    """Order in which "10" comes after "9", "decoder.10" after "decoder.9", and names come after numbers."""
    return [(int(part), "") if part.isdigit() else (10**9, part) for part in layer.split(".")]
