"""One self-contained HTML page of a comparison: the table, and pictures as inline SVG.

No script and nothing loaded from elsewhere. Not for the numbers themselves (``report.comparison``).
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from html import escape
from itertools import product
from statistics import mean
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

from apt_trainer.report.comparison import Comparison, Record, caption, last_word, rows
from apt_trainer.report.plots import BLUE, GREEN, ORANGE, PURPLE, STYLE

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; --ink: #333; --paper: #fff; --line: #ddd; --tint: #f2f2f2; --accent: #0072b2; }}
@media (prefers-color-scheme: dark) {{
  :root {{ --ink: #ddd; --paper: #1b1b1d; --line: #444; --tint: #2a2a2d; --accent: #6db9ea; }}
}}
body {{ font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 1200px;
  margin: 2em auto; padding: 0 1em; }}
.wide {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
th, td {{ padding: .35em .8em; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }}
th:first-child {{ text-align: left; }}
tr.baseline {{ background: var(--tint); }}
figure {{ margin: 1em 0; }}
svg {{ max-width: 100%; height: auto; background: #fff; border-radius: 6px; }}
.cards {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(230px, 1fr)); gap: 1em; }}
.card {{ background: var(--tint); border-radius: 8px; padding: .8em 1em; }}
.card h2, .card p {{ margin: 0; }}
.card h2 {{ font-size: 1em; }}
.card .big {{ font-size: 1.9em; font-weight: 600; color: var(--accent); }}
.rows {{ width: 100%; }}
.rows th, .rows td {{ text-align: left; vertical-align: top; white-space: normal; overflow-wrap: anywhere; }}
.rows tr > :first-child {{ width: 55%; }}
tr.dense td:nth-child(3), tr.pruned td:nth-child(4) {{ font-weight: 600; }}
@media (max-width: 640px) {{
  figure {{ overflow-x: auto; }}
  svg {{ max-width: none; width: 760px; }}
  .rows thead {{ display: none; }}
  .rows tr {{ display: block; border-bottom: 1px solid var(--line); padding: .5em 0; }}
  .rows td {{ display: block; border: 0; padding: .1em 0; }}
  .rows tr > :first-child {{ width: auto; }}
  .rows td:not(:first-child)::before {{ content: attr(data-name) ": "; color: var(--accent); }}
}}
</style>
</head>
<body>
<h1>{title}</h1>
{body}
</body>
</html>
"""
COLORS = (BLUE, ORANGE, GREEN, PURPLE, "#E69F00", "#56B4E9", "#333333")
MARKERS = "osD^vP*"
OF_DROPS = (
    ("sparsity", "perplexity.value"),
    ("speedup.whole", "accuracy.value"),
    ("accuracy.value", "perplexity.value"),
)
OF_PLANS = (("perplexity.value", "accuracy.value"),)
UNITS = {"bytes": (1e-6, " (MB)"), "seconds": (1.0, " (s)"), "ms": (1.0, " (ms)")}


def to_html(comparison: Comparison, records: Sequence[Record], title: str) -> str:
    """The page; a picture whose numbers were not measured gives way to a sentence."""
    body = [_table(comparison), f"<p>{escape(caption(comparison))}</p>"]
    latencies = [key for key in comparison.labels if key.startswith(("latency_ms.pruned.", "generation.pruned."))]
    of_training = ((latencies[-1] if latencies else "latency", "task_metric"), ("train_seconds", "peak_memory_bytes"))
    for x, y in _measured(comparison, OF_DROPS) or _measured(comparison, OF_PLANS) or of_training:
        known = {x, y} <= comparison.labels.keys()
        body.append(_scatter(comparison, x, y) if known else f"<p>Not measured: {escape(y)} against {escape(x)}.</p>")
    kept = {name: [r["kept"] for r in records if r["variant"] == name and r["kept"]] for name in comparison.cells}
    pruned = {name: runs for name, runs in kept.items() if runs}
    body.append(_layers(pruned) if pruned else "<p>Nothing was removed from any layer.</p>")
    return page(title, "\n".join(body))


def page(title: str, body: str) -> str:
    """A whole page round ``body``, which is HTML; for any width, light and dark."""
    return PAGE.format(title=escape(title), body=body)


def _measured(comparison: Comparison, pairs: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    return [pair for pair in pairs if comparison.labels.keys() >= set(pair)]


def _table(comparison: Comparison) -> str:
    table = rows(comparison)
    head = "".join(f'<th scope="col">{escape(header)}</th>' for header in table[0])
    lines = [f'<div class="wide"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>']
    for row in table:
        mark = ' class="baseline"' if row["variant"] == comparison.baseline else ""
        first, *others = map(escape, row.values())
        lines.append(f'<tr{mark}><th scope="row">{first}</th>{"".join(f"<td>{text}</td>" for text in others)}</tr>')
    return "\n".join([*lines, "</tbody></table></div>"])


def _scatter(comparison: Comparison, x: str, y: str) -> str:
    """A point per variant; bars are the standard deviation over seeds."""
    (of_x, unit_x), (of_y, unit_y) = (UNITS.get(last_word(key), (1.0, "")) for key in (x, y))
    with rc_context(STYLE):
        figure = Figure(figsize=(9, 4.5), layout="constrained")
        axes = figure.add_subplot()
        for i, (name, cells) in enumerate(comparison.cells.items()):
            h, v = cells[x], cells[y]
            if h.mean is not None and v.mean is not None:
                style: dict[str, Any] = {"color": COLORS[i % 7], "marker": MARKERS[(i + i // 7) % 7], "ls": ""}
                bars = (v.std or 0) * of_y, (h.std or 0) * of_x
                axes.errorbar(h.mean * of_x, v.mean * of_y, *bars, label=name, ms=8, capsize=3, **style)
        axes.set_xlabel(comparison.labels[x] + unit_x)
        axes.set_ylabel(comparison.labels[y] + unit_y)
        axes.grid(color="#DDDDDD", lw=0.6)
        figure.legend(loc="outside right upper")
    return svg_of(figure, f"{comparison.labels[y]} against {comparison.labels[x]}")


def _layers(kept: dict[str, list[Record]]) -> str:
    """Share of heads and neurons left per layer, and of hidden dimensions; a row per variant, mean over seeds."""
    layers = {
        kind: sorted({n for runs in kept.values() for n in runs[0]["dense"].get(kind, ())}, key=lambda n: (len(n), n))
        for kind in ("heads", "neurons", "experts")
        if any(kind in run["dense"] for runs in kept.values() for run in runs)
    }
    columns = [*layers.items(), ("hidden", [""])]
    with rc_context(STYLE):
        figure = Figure(figsize=(13, 1.4 + 0.4 * len(kept)), layout="constrained")
        panels = figure.subplots(1, len(columns), sharey=True, width_ratios=[len(names) for _, names in columns])
        for axes, (kind, names) in zip(panels, columns, strict=True):
            shares = [[mean(_share(run, kind, name) for run in runs) for name in names] for runs in kept.values()]
            axes.pcolormesh(shares, cmap="Blues", vmin=0, vmax=1.4, edgecolors="white", linewidth=2)
            for i, j in product(range(len(kept)), range(len(names) if len(names) <= 12 else 0)):
                axes.text(j + 0.5, i + 0.5, f"{100 * shares[i][j]:.0f}", ha="center", va="center", fontsize=8)
            axes.set(title=kind, xlabel="layer" if kind in layers else "")
            axes.set_xticks([j + 0.5 for j in range(len(names))], names)
            axes.set_yticks([i + 0.5 for i in range(len(kept))], list(kept))
            axes.tick_params(length=0)
        panels[0].invert_yaxis()
    return svg_of(figure, "Kept per layer, in % of the dense model")


def _share(run: Record, kind: str, layer: str) -> float:
    left, whole = run.get(kind, {}), run["dense"].get(kind, {})
    return float(left / whole if kind == "hidden" else left.get(layer, 0) / whole.get(layer, 1))


def svg_of(figure: Figure, label: str) -> str:
    """``figure`` as part of a page, with ``label`` below it."""
    name, file = re.sub(r"\W+", "-", label), io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(file, format="svg", metadata={key: None for key in ("Creator", "Date", "Format", "Type")})
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", file.getvalue())  # ids are unique in the whole page
    svg = svg[svg.index("<svg") :].replace("<svg ", f'<svg role="img" aria-label="{escape(label)}" ', 1)
    return f"<figure>\n{svg}<figcaption>{escape(label)}</figcaption>\n</figure>"
