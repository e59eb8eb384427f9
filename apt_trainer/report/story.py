"""What happens in a run, a line each: what is trained on what, cuts, teachers, evaluations, the time to come.

Only words what others know; nothing is printed here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from apt_trainer.report.plots import TUNE_NAMES
from apt_trainer.report.tables import format_seconds

BUDGETS = {
    "params": "block parameters",
    "total_params": "parameters",
    "flops": "FLOPs",
    "latency": "latency",
    "memory": "memory",
}
_TIMES = ("runtime", "per_second", "preparation_time")
_SCORES = 4  # of an evaluation, beside its loss


def opening(model: str, data: Mapping[str, Any], files: str, steps: int, settings: Any, device: str) -> list[str]:
    """What a run is going to do.

    Args:
        model: What trains.
        data: Rows of each part, by the name of the part, and how many labels there are.
        files: Where they come from.
        steps: Optimizer steps.
        settings: Of the run (``APTConfig``).
        device: Where it trains.
    """
    rows = f"{data['train']:,} rows of {files}"
    held = f"{data['validation']:,} to validate" + (f", {data['test']:,} to test" if "test" in data else "")
    labels = f", {data['labels']} labels" if data["labels"] else ""
    batch = settings.per_device_train_batch_size * settings.gradient_accumulation_steps * settings.world_size
    lines = [
        f"Training {model}",
        f"  on {rows} ({held}{labels})",
        f"  in {steps:,} steps of {batch} rows on {device}",
    ]
    if settings.prunes:
        share, what = f"{settings.target_sparsity:.0%}".replace("%", " %"), ", ".join(settings.prune_targets)
        taught = {"self": "taught by its own past", "model": f"taught by {settings.teacher_name_or_path}"}
        lines.append(f"  {share} of the {BUDGETS[settings.sparsity_metric]} will go ({what})")
        lines[-1] += f"; {taught[settings.distillation]}" if settings.distillation in taught else ""
    return lines


def event_line(record: Mapping[str, Any], before: Mapping[str, Any], metric: str = "params") -> str:
    """One record of ``events.jsonl``.

    Args:
        record: The record.
        before: ``heads``, ``neurons``, ``hidden``, ``ranks`` and ``tune`` right before it.
        metric: What the budget counts (``sparsity_metric``).
    """
    if record["kind"] == "teacher":
        return _joined(
            record["step"], f"new teacher: the model as it is, loss {record['heldout_loss']:.2f} on held-out rows"
        )
    parts = []
    if record["kind"] == "prune":
        gone = f"{record['sparsity']:.1%}".replace("%", " %")
        parts += [_cut(record, before), f"{gone} of the {BUDGETS[metric]} gone"]
        losses = record.get("loss_before"), record.get("loss_after")
        if None not in losses:
            parts.append(f"loss {losses[0]:.2f} → {losses[1]:.2f}")
    if record["ranks"] and record["ranks"] != before["ranks"]:
        parts.append(f"ranks {_range(record['ranks'])}")
    if record["tune"] != before["tune"]:
        parts.append(TUNE_NAMES.get(record["tune"], record["tune"]))
    return _joined(record["step"], *parts)


def _cut(record: Mapping[str, Any], before: Mapping[str, Any]) -> str:
    """ "cut 9 → 3 heads in layer 4", or the sum over layers and the layer that loses most."""
    told = []
    for kind in ("heads", "neurons", "experts"):  # experts: of models that have some
        left, were = record.get(kind, {}), before.get(kind, {})
        fewer = {name: (old, left.get(name, 0)) for name, old in were.items()}
        fewer = {name: sizes for name, sizes in fewer.items() if sizes[0] != sizes[1]}
        if not fewer:
            continue
        most = max(fewer, key=lambda name: (fewer[name][0] - fewer[name][1]) / record["dense"][kind].get(name, 1))
        of_most = f"{fewer[most][0]:,} → {fewer[most][1]:,}"
        if len(fewer) == 1:
            told.append(f"{of_most} {kind} in layer {most}")
            continue
        told.append(f"{sum(were.values()):,} → {sum(left.values()):,} {kind} (layer {most}: {of_most})")
    if record.get("hidden") != before.get("hidden"):
        told.append(f"{before['hidden']:,} → {record['hidden']:,} hidden dimensions")
    return f"cut {', '.join(told)}" if told else "cut nothing more"


def evaluation_line(step: int, metrics: Mapping[str, Any], of_training: bool = True) -> str:
    """Scores that a Trainer has measured, which all begin with the name of the data; ``of_training``: at ``step``."""
    named = [name.removesuffix(end) for end in ("_runtime", "_loss") for name in metrics if name.endswith(end)]
    prefix = named[0] if named else "eval"  # a loss may be a part of that of training
    scores = {
        name.removeprefix(f"{prefix}_").replace("_", " "): value
        for name, value in metrics.items()
        if name.startswith(f"{prefix}_") and isinstance(value, float) and not name.endswith((*_TIMES, "_loss"))
    }
    parts = [f"{name} {value:.4f}" for name, value in list(scores.items())[:_SCORES]]
    if f"{prefix}_loss" in metrics:
        parts.append(f"loss {metrics[f'{prefix}_loss']:.4f}")
    name = {"eval": "validation data", "validation": "validation data", "test": "test data"}.get(prefix, prefix)
    told = f"{name}: {', '.join(parts)}"
    return _joined(step, told) if of_training else told


def estimate_line(step: int, seconds: float, remaining: int, cut: bool, cuts_to_come: bool) -> str:
    """How long training is going to take: ``seconds`` a step, of the last steps; ``cut``: since the last cut."""
    since = " since the last cut" if cut else ""
    less = ", less once units are gone" if cuts_to_come else ""
    rate = f"{seconds:.2f}" if seconds < 10 else f"{seconds:.0f}"
    return _joined(step, f"{rate} s a step{since}: about {format_seconds(seconds * remaining)} of training left{less}")


def progress_line(step: int, steps: int, logs: Mapping[str, Any]) -> str:
    """What a Trainer has logged, where there is no bar to show it."""
    parts = [f"{name.replace('_', ' ')} {float(logs[name]):.4g}" for name in ("loss", "learning_rate") if name in logs]
    if logs.get("sparsity"):
        parts.append(f"{100 * float(logs['sparsity']):.1f} % gone")
    return " · ".join([f"step {step} of {steps}", *parts])


def _range(ranks: Mapping[str, int]) -> str:
    low, high = min(ranks.values()), max(ranks.values())
    return str(low) if low == high else f"{low}–{high}"


def _joined(step: int, *parts: str) -> str:
    return " · ".join([f"step {step}", *parts])
