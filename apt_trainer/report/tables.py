"""Tables of results, readable as plain text and valid as Markdown.

Only arranges numbers that were measured elsewhere; a number that is missing is shown as a dash, never guessed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from apt_trainer.measure.latency import Latency, ratio_is_noise

MISSING = "–"
Column = tuple[str, str, Callable[[Any], str] | None]


def markdown_table(rows: Sequence[Mapping[str, Any]], columns: Sequence[Column]) -> str:
    """Lay out rows as a Markdown table with padded cells; the first column is aligned left, the others right.

    Args:
        rows: One mapping per row. A key that is absent or None gives a dash.
        columns: Key, header and a function from value to text (None: ``str``) of each column.

    Returns:
        Lines joined by line breaks, without one at the end.
    """
    cells = [[header for _, header, _ in columns]]
    cells += [[_cell(row.get(key), form) for key, _, form in columns] for row in rows]
    widths = [max(3, *(len(line[i]) for line in cells)) for i in range(len(columns))]
    lines = [_line(line, widths) for line in cells]
    rule = [("-" * width if i == 0 else "-" * (width - 1) + ":") for i, width in enumerate(widths)]
    return "\n".join([lines[0], _line(rule, widths), *lines[1:]])


def comparison_table(metrics: Mapping[str, Any], with_flops: bool = False) -> str:
    """Set the pruned model beside the dense one.

    Args:
        metrics: Content of ``metrics.json``. Read keys: ``task_metric`` (pruned), ``task_metric_dense``, both with the
            ends of their interval, ``task_metric_low`` …; ``metric_name``; ``block_params``, ``total_params``,
            ``disk_bytes`` each also with ``_dense``;
            ``latency_ms`` = {"dense" | "pruned": {batch size: {"median_ms", "iqr_ms"}}}, ``sequences_per_second`` with
            numbers in their place; ``generation`` and
            ``inference_memory`` as :func:`apt_trainer.evaluate.compare.benchmark` gives them; ``train_seconds`` and
            ``peak_memory_bytes`` of the run that made the pruned model. Any of them may be absent.
        with_flops: Show ``flops`` and ``flops_dense`` too.

    Returns:
        Table with the columns measure, dense, pruned and pruned / dense.
    """
    measures: list[tuple[str, str, Callable[[Any], str]]] = [
        (str(metrics.get("metric_name") or "task metric"), "task_metric", "{:.4f}".format),
        ("parameters in blocks", "block_params", format_count),
        ("parameters in total", "total_params", format_count),
    ]
    rows = [_compared(label, metrics.get(f"{key}_dense"), metrics.get(key), form) for label, key, form in measures]
    for column, end in (("dense", "_dense"), ("pruned", "")):
        ends = (metrics.get(f"task_metric_low{end}"), metrics.get(f"task_metric_high{end}"))
        rows[0][column] += "" if ends[0] is None else f" ({_format_interval(ends)})"
    rows.append(_disk_row(metrics))
    if with_flops:
        rows.append(_compared("FLOPs, one forward", metrics.get("flops_dense"), metrics.get("flops"), format_count))
    rows += _latency_rows(metrics.get("latency_ms") or {})
    rates = metrics.get("sequences_per_second") or {}
    dense, pruned = rates.get("dense") or {}, rates.get("pruned") or {}
    for batch in sorted(set(dense) | set(pruned), key=int):
        rows.append(_compared(f"sequences/s, batch {batch}", dense.get(batch), pruned.get(batch), "{:.1f}".format))
    rows += _generation_rows(metrics)
    if metrics.get("generation"):  # else it is that of the weights, which are above
        held = (metrics.get("memory_bytes_dense"), metrics.get("memory_bytes"))
        rows.append(_compared("memory of weights and cache, largest batch", *held, format_bytes))
    peaks = {name: peak["peak_bytes"] for name, peak in (metrics.get("inference_memory") or {}).items()}
    rows.append(_compared("peak memory in use", peaks.get("dense"), peaks.get("pruned"), format_bytes))
    measures = [
        ("training time", "train_seconds", format_seconds),
        ("peak memory in training", "peak_memory_bytes", format_bytes),
    ]
    rows += [_compared(label, metrics.get(f"{key}_dense"), metrics.get(key), form) for label, key, form in measures]
    rows = [row for row in rows if row["dense"] != MISSING or row["pruned"] != MISSING]
    headers = ("measure", "dense", "pruned", "pruned / dense")
    return markdown_table(rows, [(header, header, None) for header in headers])


def exports_table(metrics: Mapping[str, Any]) -> str:
    """The formats that a run has written beside the dense and the pruned model in PyTorch: size, metric, speed.

    Args:
        metrics: Content of ``metrics.json``; ``exports`` = {name: what ``runs.exports`` tells of it}.

    Returns:
        Table with a row for each model; speeds are multiples of the dense model's in PyTorch on the CPU.
    """
    exports = metrics["exports"]
    timed = [record["speed"] for record in exports.values() if "speed" in record]
    metric = str(metrics.get("metric_name") or "task metric")
    rows: list[dict[str, Any]] = [
        {
            "model": f"{name}, PyTorch",
            "size": metrics.get(f"disk_bytes{end}"),
            metric: metrics.get(f"task_metric{end}"),
        }
        for name, end in (("dense", "_dense"), ("pruned", ""))
    ]
    if timed:
        rows[1] |= _speedups(timed[0]["speedup"]["pruned"])
        rows[0] |= dict.fromkeys(_speedups(timed[0]["speedup"]["pruned"]), 1.0)
    for name, record in exports.items():
        row = {"model": name, "size": record["bytes"], metric: record.get("task_metric")}
        rows.append(row | (_speedups(record["speed"]["speedup"]["export"]) if "speed" in record else {}))
    columns: list[Column] = [("model", "model", None), ("size", "size on disk", format_bytes)]
    if any(row[metric] is not None for row in rows[2:]):
        columns.append((metric, metric, "{:.4f}".format))
    speeds = dict.fromkeys(key for row in rows for key in row if key not in ("model", "size", metric))
    columns += [(name, name, "{:.2f} ×".format) for name in speeds]
    return markdown_table(rows, columns)


def _speedups(found: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """{"speed, batch 1": …} of what ``store.export.speed`` tells, of generation {"prefill, batch 1": …}."""
    return {
        f"{'speed' if part == 'forward' else part}, batch {size}": factor
        for size, parts in found.items()
        for part, factor in parts.items()
    }


def held_out_table(metrics: Mapping[str, Any]) -> str:
    """Scores of a full model and of a smaller one with their 95 % intervals, and how much faster the smaller one is.

    Args:
        metrics: What :meth:`apt_trainer.studies.held_out.HeldOut.metrics` gives.
    """
    scores, whole = _named_scores(metrics), _named_scores(metrics.get("dense", {}))
    rows: list[dict[str, Any]] = [
        {"measure": name, "full": _score(whole.get(name)), "smaller": _score(one)} for name, one in scores.items()
    ]
    rows += [
        {
            "measure": "cache, bytes" if name == "cache" else f"speed, {name}, on {metrics['timed_on']}",
            "full": "1",
            "smaller": f"{value:.2f} ×",
        }
        for name, value in metrics.get("speedup", {}).items()
    ]
    for key, name in (("sdr", "SDR"), ("sdr_relative", "SDR, relative")):
        if metrics.get(key) is not None:
            rows.append({"measure": name, "smaller": f"{metrics[key]:.3f}"})
    return markdown_table(rows, [(header, header, None) for header in ("measure", "full", "smaller")])


def _named_scores(found: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    names = {"perplexity": "perplexity", "exp_loss": "exp(loss)", "accuracy": "mean of tasks"}
    scores = {name: found[key] for key, name in names.items() if key in found}
    return scores | {f"{name}, {task['metric']}": task for name, task in found.get("tasks", {}).items()}


def _score(one: Mapping[str, Any] | None) -> str | None:
    if one is None or one["value"] is None:
        return None
    ends = f" ({one['low']:.4g} to {one['high']:.4g})" if "low" in one else ""
    return f"{one['value']:.4g}{ends}"


def scores_table(found: Mapping[str, Any]) -> str:
    """Table of scores with their confidence intervals.

    Args:
        found: What ``evaluate`` writes: ``task`` (metric to number), ``perplexity`` and ``lm_eval``, each optional.
    """
    rows: list[dict[str, Any]] = []
    task = found.get("task") or {}
    for name, value in task.items():
        if not name.endswith(("_low", "_high")):
            ends = (task.get(f"{name}_low"), task.get(f"{name}_high"))
            rows.append({"measure": name, "value": value, "ends": ends})
    if text := found.get("perplexity"):
        row = {"measure": f"perplexity, windows of {text['window']:,}", "on": f"{text['predicted_tokens']:,} tokens"}
        if text["start_token"] is not None:
            row["measure"] += f" from {text['start_token']}"
        rows.append(row | {"value": text["value"], "ends": (text.get("low"), text.get("high"))})
    for name, result in (found.get("lm_eval") or {}).items():
        on = f"{result['examples']:,} examples" if result["examples"] else None
        for metric, score in result["metrics"].items():
            ends = (score.get("low"), score.get("high"))
            rows.append({"measure": f"{name}, {metric}", "value": score["value"], "ends": ends, "on": on})
    columns: list[Column] = [
        ("measure", "measure", None),
        ("value", "value", "{:.4f}".format),
        ("ends", "95 % interval", _format_interval),
        ("on", "on", None),
    ]
    return markdown_table(rows, columns)


def format_bytes(count: float | None) -> str:
    """Bytes in decimal units: 999 B, 1.5 kB, 438.0 MB."""
    return _scaled(count, ("B", "kB", "MB", "GB", "TB"))


def format_count(count: float | None) -> str:
    """Counts in decimal units: 999, 1.5 k, 109.5 M, 7.2 G."""
    return _scaled(count, ("", "k", "M", "G", "T"))


def format_seconds(seconds: float | None) -> str:
    """Durations: 9.5 s, 12 min 05 s, 3 h 04 min."""
    if seconds is None:
        return MISSING
    if round(seconds, 1) < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def _disk_row(metrics: Mapping[str, Any]) -> dict[str, str]:
    """Bytes of weight files; two types are named, and not compared."""
    row = _compared("size on disk", metrics.get("disk_bytes_dense"), metrics.get("disk_bytes"), format_bytes)
    types = {name: metrics.get(f"disk_dtype{which}") for name, which in (("dense", "_dense"), ("pruned", ""))}
    if types["dense"] != types["pruned"]:
        row |= {name: f"{row[name]} ({dtype})" for name, dtype in types.items() if dtype and row[name] != MISSING}
        row["pruned / dense"] = MISSING
    return row


def _latency_rows(latency: Mapping[str, Mapping[str, Any]]) -> list[dict[str, str]]:
    dense, pruned = latency.get("dense") or {}, latency.get("pruned") or {}
    rows = []
    for batch_size in sorted(set(dense) | set(pruned), key=int):
        a, b = _latency(dense.get(batch_size)), _latency(pruned.get(batch_size))
        row = _compared(f"latency, batch {batch_size}", a, b, _format_latency)
        if a is not None and b is not None:
            noise = " (within noise)" if ratio_is_noise(a, b) else ""
            row["pruned / dense"] = _ratio(a.median_ms, b.median_ms) + noise
        rows.append(row)
    return rows


def _generation_rows(metrics: Mapping[str, Any]) -> list[dict[str, str]]:
    """Tokens per second of prompt and decoding, and the cache, per batch size."""
    speeds = metrics.get("generation") or {}
    dense, pruned = speeds.get("dense") or {}, speeds.get("pruned") or {}
    rows = []
    for batch_size in sorted(set(dense) & set(pruned), key=int):
        size = f"batch {batch_size} × {metrics['prompt_length']}"
        for part in ("prefill", "decode"):
            a, b = (_rate(of_model[batch_size], part) for of_model in (dense, pruned))
            row = _compared(f"{part}, {size}", a, b, _format_rate)
            noise = " (within noise)" if metrics["within_noise"][batch_size][part] else ""
            row["pruned / dense"] = _ratio(a[0], b[0]) + noise
            rows.append(row)
        caches = [of_model[batch_size]["cache_bytes"] for of_model in (dense, pruned)]
        rows.append(_compared(f"cache, {size} + {metrics['new_tokens']}", caches[0], caches[1], format_bytes))
    return rows


def _rate(speed: Mapping[str, Any], part: str) -> tuple[float, float]:
    """(tokens per second, interquartile range over median in percent)."""
    times = speed[f"{part}_ms"]
    return speed[f"{part}_tokens_per_second"], 100 * times["iqr_ms"] / times["median_ms"]


def _format_rate(rate: tuple[float, float]) -> str:
    return f"{rate[0]:,.1f} tokens/s (IQR {rate[1]:.0f} %)"


def _format_interval(ends: tuple[float | None, float | None]) -> str:
    return MISSING if ends[0] is None else f"{ends[0]:.4f} to {ends[1]:.4f}"


def _compared(label: str, dense: Any, pruned: Any, form: Callable[[Any], str]) -> dict[str, str]:
    plain = isinstance(dense, int | float) and isinstance(pruned, int | float)
    ratio = _ratio(dense, pruned) if plain else MISSING
    return {
        "measure": label,
        "dense": _cell(dense, form),
        "pruned": _cell(pruned, form),
        "pruned / dense": ratio,
    }


def _ratio(dense: float, pruned: float) -> str:
    return f"{100 * pruned / dense:.1f} %" if dense > 0 else MISSING


def _latency(entry: Mapping[str, Any] | None) -> Latency | None:
    return None if entry is None else Latency(entry["median_ms"], entry["iqr_ms"], entry.get("runs", 0))


def _format_latency(latency: Latency) -> str:
    return f"{latency.median_ms:.2f} ms (IQR {latency.iqr_ms:.2f})"


def _scaled(count: float | None, units: Sequence[str]) -> str:
    if count is None:
        return MISSING
    if abs(count) < 1000:
        return f"{count:g} {units[0]}".strip()
    power = 0
    while round(abs(count), 1) >= 1000 and power < len(units) - 1:
        count, power = count / 1000, power + 1
    return f"{count:.1f} {units[power]}"


def _cell(value: Any, form: Callable[[Any], str] | None) -> str:
    if value is None:
        return MISSING
    text = str(value) if form is None else form(value)
    return text.replace("|", "\\|").replace("\n", " ")


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    padded = [
        cell.ljust(width) if i == 0 else cell.rjust(width)
        for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
    ]
    return f"| {' | '.join(padded)} |"
