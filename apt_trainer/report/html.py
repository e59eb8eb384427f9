"""One self-contained HTML page of a comparison: the table, and pictures as inline SVG.

No script and nothing loaded from elsewhere. Not for the numbers themselves (``report.comparison``).
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from html import escape
from statistics import mean

from matplotlib import colormaps, rc_context
from matplotlib.figure import Figure

from apt_trainer.report.comparison import Cell, Comparison, Record, caption, rows
from apt_trainer.report.plots import BLUE, GREEN, ORANGE, PURPLE, STYLE

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1200px; margin: 2em auto; padding: 0 1em; }}
.wide {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
th, td {{ padding: .35em .8em; text-align: right; white-space: nowrap; border-bottom: 1px solid #ddd; }}
th:first-child {{ text-align: left; }}
thead th {{ border-bottom: 2px solid #888; }}
tr.baseline {{ background: #f2f2f2; }}
svg {{ max-width: 100%; height: auto; }}
figure {{ margin: 2em 0; }}
figcaption, p {{ color: #555; }}
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


def to_html(comparison: Comparison, records: Sequence[Record], title: str) -> str:
    """The page; a picture whose numbers were not measured gives way to a sentence."""
    names, latencies = (
        list(comparison.labels),
        [key for key in comparison.labels if key.startswith("latency_ms.pruned.")],
    )
    body = [_table(comparison), f"<p>{escape(caption(comparison))}</p>"]
    for y, x in (("task_metric", latencies[-1] if latencies else "latency"), ("peak_memory_bytes", "train_seconds")):
        body.append(
            _scatter(comparison, x, y) if x in names and y in names else f"<p>No {y} against {x}: not measured.</p>"
        )
    kept = {name: [r["kept"] for r in records if r["variant"] == name and r["kept"]] for name in comparison.cells}
    kept = {name: of for name, of in kept.items() if of}
    body.append(_layers(kept) if kept else "<p>Nothing was removed from any layer.</p>")
    return PAGE.format(title=escape(title), body="\n".join(body))


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
    """A point per variant, with the spread over seeds as bars."""
    with rc_context(STYLE):
        figure = Figure(figsize=(9, 4.5), layout="constrained")
        axes = figure.add_subplot()
        for i, (name, cells) in enumerate(comparison.cells.items()):
            (px, ex), (py, ey) = (_scaled(key, cells[key]) for key in (x, y))
            if px is not None and py is not None:
                style = {"color": COLORS[i % 7], "marker": MARKERS[(i + i // 7) % 7], "ls": "", "ms": 8, "capsize": 3}
                axes.errorbar(px, py, ey, ex, label=name, **style)
        axes.set_xlabel(_axis(comparison, x))
        axes.set_ylabel(_axis(comparison, y))
        axes.grid(color="#DDDDDD", lw=0.6)
        figure.legend(loc="outside right upper")
    return _svg(figure, f"{comparison.labels[y]} against {comparison.labels[x]}")


def _layers(kept: dict[str, list[Record]]) -> str:
    """Share of heads and neurons left per layer, and of hidden dimensions; a row per variant, mean over seeds."""
    dense = next(iter(kept.values()))[0]["dense"]
    layers = {kind: sorted(dense[kind], key=lambda name: (len(name), name)) for kind in ("heads", "neurons")}
    widths = [*(len(names) for names in layers.values()), 1]
    with rc_context(STYLE):
        figure = Figure(figsize=(13, 1.4 + 0.4 * len(kept)), layout="constrained")
        panels = figure.subplots(1, 3, sharey=True, width_ratios=widths)
        for axes, kind, width in zip(panels, ("heads", "neurons", "hidden"), widths, strict=True):
            shares = [[_share(runs, kind, name) for name in layers.get(kind, [""])] for runs in kept.values()]
            axes.pcolormesh(shares, cmap=colormaps["Blues"], vmin=0, vmax=1.4, edgecolors="white", linewidth=2)
            for i, row in enumerate(shares if width <= 12 else ()):
                for j, share in enumerate(row):
                    axes.text(j + 0.5, i + 0.5, f"{100 * share:.0f}", ha="center", va="center", fontsize=8)
            axes.set_title(f"{kind} left, %")
            axes.set_xticks([j + 0.5 for j in range(width)], layers.get(kind, [""]))
            axes.set_yticks([i + 0.5 for i in range(len(kept))], list(kept))
            axes.set_xlabel("layer" if kind in layers else "")
            axes.tick_params(length=0)
        panels[0].invert_yaxis()
    return _svg(figure, "What was kept per layer")


def _share(runs: list[Record], kind: str, layer: str) -> float:
    pairs = [
        (r[kind], r["dense"][kind]) if kind == "hidden" else (r[kind].get(layer, 0), r["dense"][kind][layer])
        for r in runs
    ]
    return mean(left / whole for left, whole in pairs)


def _scaled(key: str, cell: Cell) -> tuple[float | None, float | None]:
    factor = 1e-6 if key.endswith("bytes") else 1.0
    return tuple(None if number is None else number * factor for number in (cell.mean, cell.std))  # type: ignore[return-value]


def _axis(comparison: Comparison, key: str) -> str:
    unit = {"bytes": "MB", "seconds": "s", "ms": "ms"}.get(key.rsplit("_", 1)[-1])
    return comparison.labels[key] + (f" ({unit})" if unit else "")


def _svg(figure: Figure, label: str) -> str:
    name, file = re.sub(r"\W+", "-", label), io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(file, format="svg", metadata={key: None for key in ("Creator", "Date", "Format", "Type")})
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", file.getvalue())  # ids are unique in the whole page
    svg = svg[svg.index("<svg") :].replace("<svg ", f'<svg role="img" aria-label="{escape(label)}" ', 1)
    return f"<figure>\n{svg}<figcaption>{escape(label)}</figcaption>\n</figure>"
