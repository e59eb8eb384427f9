"""One self-contained HTML page of one run, for who decides: how much smaller, faster and worse the model has become,
and for which inputs it says something else than the dense one.

Only arranges what the folder of the run holds; what was not measured is said to be so. No script, nothing loaded from
elsewhere, every text escaped. Not for several runs: ``report.html``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from apt_trainer.report.comparison import read_json
from apt_trainer.report.html import page, svg_of
from apt_trainer.report.plots import draw_run
from apt_trainer.report.tables import comparison_table, exports_table, format_bytes, format_seconds
from apt_trainer.store.events import DIFFERENCES_FILE, EVENTS_FILE, METRICS_FILE, read_events

_CELL_ENDS = re.compile(r"(?<!\\)\|")
_COLUMNS = (("text", "input"), ("label", "right"), ("dense", "dense says"), ("pruned", "pruned says"))
_UNKNOWN = (
    "<p>Not known: this takes a dense model that was fine-tuned on the same data (dense_baseline: true) and a task "
    "of texts that gives each row labels or numbers.</p>"
)
_Metrics = Mapping[str, Any]


class Card(NamedTuple):
    """A question, its answer in a few words, and what that says in full."""

    question: str
    answer: str
    how: str


def run_page(folder: Path, title: str) -> str:
    """The page of the finished run in ``folder``."""
    metrics = read_json(folder / METRICS_FILE)
    history = read_json(folder / "trainer_state.json").get("log_history", [])
    figure = draw_run(read_events(folder / EVENTS_FILE), history, "")
    parts = [
        f'<div class="cards">\n{"".join(map(_card, answers(metrics)))}</div>',
        "<h2>For which inputs it differs from the dense model</h2>",
        *_differences(read_json(folder / DIFFERENCES_FILE)),
        "<h2>What is left of it</h2>",
        svg_of(figure, "Sparsity, losses and ranks over steps, and what is left of each layer"),
        "<h2>All numbers</h2>",
        _table(comparison_table(metrics)),
    ]
    if metrics.get("exports"):
        parts += ["<h2>Exports</h2>", _table(exports_table(metrics))]
    return page(title, "\n".join(parts))


def answers(metrics: _Metrics) -> list[Card]:
    """What ``metrics.json`` answers."""
    return [_smaller(metrics), _faster(metrics), _worse(metrics), _cost(metrics)]


def _smaller(metrics: _Metrics) -> Card:
    new, old = metrics["disk_bytes"], metrics["disk_bytes_dense"]
    how = f"{format_bytes(new)} on disk instead of {format_bytes(old)}"
    sizes = {record["bytes"]: name for name, record in metrics.get("exports", {}).items()}
    if sizes:
        how += f"; exported as {sizes[min(sizes)]} {format_bytes(min(sizes))}"
    return Card("How much smaller?", f"{100 * (1 - new / old):.0f} % smaller", how)


def _faster(metrics: _Metrics) -> Card:
    """From times of a forward pass, or of a token that is generated, at the largest batch."""
    question, times, part = "How much faster?", metrics.get("latency_ms"), ""
    if metrics.get("generation"):
        times, part = metrics["generation"], " for a token of each"
    if not times:
        return Card(question, "not measured", "measure_latency: true measures it")
    batch = max(times["pruned"], key=int)
    measured = (times["dense"][batch], times["pruned"][batch])
    old, new = (of_model.get("decode_ms", of_model)["median_ms"] for of_model in measured)
    texts = "one text" if batch == "1" else f"{batch} texts at once"
    how = f"{new:.1f} ms instead of {old:.1f} ms{part}, {texts}, in PyTorch"
    exports = {name: record["speed"] for name, record in metrics.get("exports", {}).items() if "speed" in record}
    if exports:
        factors = {name: max(_factors(speed)) for name, speed in exports.items()}
        best = max(factors, key=lambda name: factors[name])
        how += f"; exported as {best} up to {factors[best]:.1f} times"
    return Card(question, f"{old / new:.1f} times as fast", how)


def _factors(speed: Mapping[str, Any]) -> list[float]:
    return [factor for parts in speed["speedup"]["export"].values() for factor in parts.values()]


def _worse(metrics: _Metrics) -> Card:
    question, name = "How much worse?", metrics["metric_name"]
    new, old = metrics["task_metric"], metrics.get("task_metric_dense")
    if old is None:
        how = f"{name} {new:.4f}; dense_baseline: true fine-tunes the dense model too, to compare with"
        return Card(question, "not known", how)
    if 0 <= new <= 1 and 0 <= old <= 1:
        answer = f"{100 * (new - old):+.1f} points"
    else:
        answer = f"{100 * (new - old) / abs(old):+.1f} %" if old else f"{new - old:+.4g}"
    how = f"{name} {new:.4f} instead of {old:.4f} on the {metrics['evaluated_on']} data"
    if metrics.get("task_metric_low") is not None:
        how += f" (95 % interval: {metrics['task_metric_low']:.4f} to {metrics['task_metric_high']:.4f})"
    return Card(question, answer, how + ("" if metrics.get("greater_is_better", True) else "; lower is better"))


def _cost(metrics: _Metrics) -> Card:
    how = f"of training on {metrics.get('device', 'this machine')}"
    if metrics.get("train_seconds_dense") is not None:
        how += f"; fine-tuning the dense model took {format_seconds(metrics['train_seconds_dense'])}"
    return Card("What did it cost?", format_seconds(metrics["train_seconds"]), how)


def _card(card: Card) -> str:
    question, answer, how = map(escape, card)
    return f'<section class="card"><h2>{question}</h2><p class="big">{answer}</p><p>{how}</p></section>\n'


def _differences(found: Mapping[str, Any]) -> list[str]:
    if not found:
        return [_UNKNOWN]
    right, differ, shown = found["right"], found["differ"], found["examples"]
    first = "" if found["rows"] == found["of"] else f" (the first of {found['of']:,})"
    said = f"On <strong>{differ:,} of {found['rows']:,}</strong> test rows{first} the two say something else."
    if differ and found["numbers"]:
        said += f" The dense model is nearer to what is right on {right['dense']:,}, the pruned one on"
        said += f" {right['pruned']:,} of them."
    elif differ:
        said += f" Only the dense model is right on {right['dense']:,} of them, only the pruned one on"
        said += f" {right['pruned']:,}, neither on {right['neither']:,}."
    if len(shown) < differ:
        said += f" Below are {len(shown)} of them."
    return [f"<p>{said}</p>", *([_rows(shown)] if shown else [])]


def _rows(examples: Sequence[Mapping[str, Any]]) -> str:
    head = "".join(f'<th scope="col">{title}</th>' for _, title in _COLUMNS)
    lines = []
    for example in examples:
        cells = "".join(f'<td data-name="{title}">{escape(str(example[key]))}</td>' for key, title in _COLUMNS)
        lines.append(f'<tr class="{escape(example["right"])}">{cells}</tr>\n')
    return f'<table class="rows">\n<thead><tr>{head}</tr></thead>\n<tbody>\n{"".join(lines)}</tbody></table>'


def _table(markdown: str) -> str:
    """A table of ``report.tables`` as HTML."""
    head, _, *lines = ([cell.strip() for cell in _CELL_ENDS.split(line)[1:-1]] for line in markdown.splitlines())
    told = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)
    rows = []
    for first, *others in lines:
        cells = "".join(f"<td>{escape(cell)}</td>" for cell in others)
        rows.append(f'<tr><th scope="row">{escape(first)}</th>{cells}</tr>\n')
    return f'<div class="wide"><table>\n<thead><tr>{told}</tr></thead>\n<tbody>\n{"".join(rows)}</tbody></table></div>'
