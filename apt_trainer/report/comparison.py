"""Runs side by side: mean and spread over seeds per variant, and the change against a baseline.

A number that was not measured is a dash. Changes are taken between runs of the same seed, where both variants have
one. Not for pictures (``report.html``).
"""

from __future__ import annotations

import csv
import difflib
import io
import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

from apt_trainer.errors import UserError, unknown_choice
from apt_trainer.report.tables import MISSING, format_bytes, format_count, format_seconds, markdown_table
from apt_trainer.store.events import EVENTS_FILE, METRICS_FILE, RESULTS_FILE, read_events

logger = logging.getLogger(__name__)

LABELS = {
    "sparsity": "removed",
    "total_params": "parameters",
    "disk_bytes": "size on disk",
    "train_seconds": "training time",
    "train_cpu_seconds": "CPU time",
    "peak_memory_bytes": "peak memory",
    "inference_memory.pruned.peak_bytes": "peak memory in use",
    "time_to_accuracy.seconds": "time to accuracy",
}
COSTS: dict[str, Any] = {  # by the last word of the key; compared as ratios
    "seconds": format_seconds,
    "bytes": format_bytes,
    "params": format_count,
    "flops": format_count,
    "ms": "{:.2f} ms".format,
}
Record = Mapping[str, Any]
_KEPT = ("heads", "neurons", "experts", "hidden", "dense")
_OF_WHOLE_RUNS = ("train_seconds", "train_cpu_seconds", "peak_memory_bytes")  # a resumed one knows its last part only


class Cell(NamedTuple):
    """One metric of one variant over ``n`` seeds; std: of the sample; change and ratio: against the baseline; low and
    high: of an only seed, the interval that the run itself gives."""

    n: int = 0
    mean: float | None = None
    std: float | None = None
    change: float | None = None
    change_std: float | None = None
    ratio: float | None = None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Comparison:
    """``labels``: headers by key of a metric; ``cells``: by variant and key; ``seeds``: how many, by variant."""

    labels: dict[str, str]
    cells: dict[str, dict[str, Cell]]
    seeds: dict[str, int]
    baseline: str | None


def run_record(folder: Path, variant: str | None = None) -> dict[str, Any]:
    """What a comparison needs of one finished run; the variant is by default named after the folder."""
    metrics, place = read_json(folder / METRICS_FILE), folder.resolve()
    sized = [event for event in read_events(folder / EVENTS_FILE) if event.get("dense")]
    return {
        "variant": variant or (place.parent if place.name.startswith("seed-") else place).name,
        "seed": metrics.get("seed", 0),
        "resumed": bool(metrics.get("resumed")),
        "metrics": metrics,
        "kept": {key: sized[-1][key] for key in _KEPT if key in sized[-1]} if sized else None,
    }


def read_results(paths: Sequence[str]) -> list[dict[str, Any]]:
    """Records of study folders and of folders of single runs; of several studies, names start with the study's.

    Raises:
        UserError: for a folder that holds neither or results of something else, or two runs of one variant and seed.
    """
    studies = [path for path in paths if (Path(path) / RESULTS_FILE).is_file()]
    records: list[dict[str, Any]] = []
    for path in paths:
        if path in studies:
            prefix = f"{Path(path).resolve().name}/" if len(studies) > 1 else ""
            records += [r | {"variant": f"{prefix}{r['variant']}"} for r in _read_study(Path(path) / RESULTS_FILE)]
        elif (Path(path) / METRICS_FILE).is_file():
            records.append(run_record(Path(path)))
        else:
            raise UserError(f"{path} holds neither {RESULTS_FILE} nor {METRICS_FILE}: no study and no finished run.")
    keys = [(record["variant"], record["seed"]) for record in records]
    for key in keys:
        if keys.count(key) > 1:
            raise UserError(f"Two runs are called {key[0]!r} with seed {key[1]}. Name each once, or rename a folder.")
    return records


def is_training_run(folder: Path) -> bool:
    """Whether ``folder``, of :func:`read_results`, holds what a page of one run tells; that of a study, of ``drop`` or
    of ``paint`` does not."""
    return not (folder / RESULTS_FILE).is_file() and "disk_bytes" in read_json(folder / METRICS_FILE)


def _read_study(path: Path) -> list[dict[str, Any]]:
    records = read_events(path)
    for number, record in enumerate(records, start=1):
        if not {"variant", "seed", "metrics"} <= record.keys():
            raise UserError(
                f"{path}, line {number}, is of no run: it lacks variant, seed or metrics. Name folders of studies "
                "(apt-trainer ablate) or of finished runs; curve and paint write tables of their own."
            )
    return records


def compare(records: Sequence[Record], baseline: str | None = None) -> Comparison:
    """Arrange runs by variant; ``baseline`` is by default the one that the study names.

    Logs a warning for each metric of the study that no run has.

    Raises:
        UserError: for an unknown baseline, no runs, or runs that have none of the metrics.
    """
    if not records:
        raise UserError("There is no finished run to compare.")
    runs: dict[str, list[Record]] = {}
    for record in records:
        runs.setdefault(record["variant"], []).append(record)
    if baseline is not None and baseline not in runs:
        raise unknown_choice("baseline", baseline, runs)
    own = records[0].get("baseline")
    baseline = baseline or (own if own in runs else None)
    cells: dict[str, dict[str, Cell]] = {name: {} for name in runs}
    keys = records[0].get("shown") or _default_keys(records)
    _check_known(keys, records)
    for key in keys:
        values = {name: {r["seed"]: v for r in of if (v := _value(r, key)) is not None} for name, of in runs.items()}
        for name, of in runs.items():
            base = {} if baseline in (None, name) else values[str(baseline)]
            low, high = _interval(of[0], key) if len(of) == 1 else (None, None)
            cells[name][key] = _cell(values[name], base, last_word(key) in COSTS)._replace(low=low, high=high)
    seeds = {name: len(of) for name, of in runs.items()}
    return Comparison({key: _label(key, records) for key in keys}, cells, seeds, baseline)


def rows(comparison: Comparison) -> list[dict[str, str]]:
    """The table as texts, by header."""
    return [
        {"variant": name, "seeds": str(comparison.seeds[name])}
        | {label: _text(key, cells[key], comparison.seeds[name]) for key, label in comparison.labels.items()}
        for name, cells in comparison.cells.items()
    ]


def caption(comparison: Comparison) -> str:
    base = f"In brackets, against {comparison.baseline}: difference (± over seeds), or for costs the ratio of means."
    fewer = any(0 < c.n < comparison.seeds[name] for name, cells in comparison.cells.items() for c in cells.values())
    ends = any(cell.low is not None for cells in comparison.cells.values() for cell in cells.values())
    parts = ["Mean ± sample standard deviation over seeds.", "n of m: n of m seeds have it." if fewer else ""]
    parts += ["a to b: 95 % interval of an only run." if ends else ""]
    return " ".join(filter(None, [*parts, base if comparison.baseline else ""]))


def to_markdown(comparison: Comparison) -> str:
    table = rows(comparison)
    return markdown_table(table, [(header, header, None) for header in table[0]]) + f"\n\n{caption(comparison)}"


def to_csv(comparison: Comparison) -> str:
    """One line per variant in full precision; for each metric all parts of :class:`Cell`."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["variant", *(f"{key}.{part}" for key in comparison.labels for part in Cell._fields)])
    for name, cells in comparison.cells.items():
        writer.writerow([name, *(number for cell in cells.values() for number in cell)])
    return file.getvalue()


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; no file counts as an empty one."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}
    except (ValueError, TypeError):
        raise UserError(f"{path} is not a JSON object. Remove the folder of that run, and run it anew.") from None


def last_word(key: str) -> str:
    """Of the name of a metric, which tells its unit: "seconds" of both ``train_seconds`` and ``a_mark.seconds``."""
    return re.split("[._]", key)[-1]


def _check_known(keys: Sequence[str], records: Sequence[Record]) -> None:
    """Warn of metrics that no run has; raise :class:`UserError` where that is all of them."""
    known = {key for record in records for key in _keys(record["metrics"])}
    unknown = [key for key in keys if key not in known]
    numbers = sorted(key for key in known if any(_value(record, key) is not None for record in records))
    messages = []
    for key in unknown:
        close = difflib.get_close_matches(key, numbers, n=3, cutoff=0.7)
        hint = f"Did you mean {' or '.join(close)}?" if close else f"They have {', '.join(_default_keys(records))}."
        messages.append(f"metrics: no run has {key!r}. {hint}")
    if messages and len(unknown) == len(keys):
        raise UserError(messages[0])
    for message in messages:
        logger.warning("%s", message)


def _keys(values: Mapping[str, Any], start: str = "") -> list[str]:
    """Dotted keys of what is no mapping."""
    keys: list[str] = []
    for key, value in values.items():
        keys += _keys(value, f"{start}{key}.") if isinstance(value, dict) else [f"{start}{key}"]
    return keys


def _default_keys(records: Sequence[Record]) -> list[str]:
    batches = {batch for r in records for batch in r["metrics"].get("latency_ms", {}).get("pruned", {})}
    keys = ["task_metric", *LABELS, *(f"latency_ms.pruned.{batch}.median_ms" for batch in sorted(batches, key=int))]
    return [key for key in keys if any(_value(record, key) is not None for record in records)]


def _value(record: Record, key: str) -> float | None:
    found: Any = record["metrics"]
    for part in key.split("."):
        found = found.get(part) if isinstance(found, dict) else None
    partial = key in _OF_WHOLE_RUNS and record.get("resumed")
    return found if isinstance(found, int | float) and not partial else None


def _interval(record: Record, key: str) -> tuple[float | None, float | None]:
    """Ends of the 95 % interval that stand beside a ``value``."""
    group, _, name = key.rpartition(".")
    return (_value(record, f"{group}.low"), _value(record, f"{group}.high")) if name == "value" else (None, None)


def _label(key: str, records: Sequence[Record]) -> str:
    names = {str(record["metrics"].get("metric_name")) for record in records}
    if key == "task_metric" and len(names) == 1:
        return names.pop()
    latency = key.startswith("latency_ms.pruned.") and key.endswith(".median_ms")
    if latency:
        return f"latency, batch {key.split('.')[2]}"
    return LABELS.get(key, key.removesuffix(".value"))


def _cell(values: Mapping[int, float], base: Mapping[int, float], is_cost: bool) -> Cell:
    cell = Cell(len(values), *_spread(list(values.values())))
    seeds = [seed for seed in values if seed in base]
    here, there = ([of[s] for s in seeds] if seeds else list(of.values()) for of in (values, base))
    if not here or not there:
        return cell
    differences = [a - b for a, b in zip(here, there, strict=True)] if seeds else [mean(here) - mean(there)]
    change, change_std = _spread(differences)
    ratio = mean(here) / mean(there) if is_cost and mean(there) else None
    return cell._replace(change=change, change_std=change_std, ratio=ratio)


def _spread(values: Sequence[float]) -> tuple[float | None, float | None]:
    return mean(values) if values else None, stdev(values) if len(values) > 1 else None


def _text(key: str, cell: Cell, seeds: int) -> str:
    if cell.mean is None:
        return MISSING
    form = COSTS.get(last_word(key), "{:.4f}".format)
    text = form(cell.mean) + (f" ± {form(cell.std)}" if cell.std is not None else "")
    notes = [f"{cell.n} of {seeds}"] if cell.n < seeds else []
    if cell.low is not None and cell.high is not None:
        notes.append(f"{form(cell.low)} to {form(cell.high)}")
    if cell.ratio is not None:
        notes.append(f"{cell.ratio:.2f}×")
    elif cell.change is not None:
        notes.append(f"{cell.change:+.4f}" + (f" ± {cell.change_std:.4f}" if cell.change_std is not None else ""))
    return text + (f" ({'; '.join(notes)})" if notes else "")
