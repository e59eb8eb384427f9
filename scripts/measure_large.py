"""A large decoder with random weights: PEFT LoRA on the dense model beside pruning 30 % before tuning.

    python scripts/measure_large.py [--shape llama-2-7b] [--batch_size 4] [--length 512] [--steps 24] [--output FILE]

Each side trains in a process of its own, in bfloat16, on random tokens: time and memory do not depend on what is
learnt. Prints JSON: seconds per step (median of the second half of the steps, when ranks have grown), seconds of
scoring and cutting, peak memory of training and of scoring, memory and speed of generation. Needs an accelerator for
any shape but "tiny". Not for accuracy.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch.utils.data import Dataset
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

from apt_trainer import APTConfig, APTTrainer
from apt_trainer.evaluate.compare import measure_speed
from apt_trainer.measure import count_parameters, peak_memory_bytes, reset_peak
from apt_trainer.measure.generation import generate_once

SHAPES: dict[str, dict[str, int]] = {
    "llama-2-7b": {},  # what LlamaConfig is made for
    "tiny": {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 4, "num_attention_heads": 4},
}
TARGETS = ["q_proj", "v_proj", "gate_proj"]
"""What the released script of APT adapts in LLaMA; both sides do."""


class RandomTokens(Dataset):
    """Rows of ``length`` random tokens that are their own labels; the same at every call."""

    def __init__(self, rows: int, length: int, vocabulary: int) -> None:
        self._ids = torch.randint(vocabulary, (rows, length), generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self._ids[row], "labels": self._ids[row]}


class Clock(TrainerCallback):
    """Seconds of every step, the device waited for; starts the peak of memory anew when the first step begins."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.peak_before = 0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        wait()
        if not self.seconds:
            self.peak_before = peak_memory_bytes(args.device)
            reset_peak(args.device)
        self._started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        wait()
        self.seconds.append(time.perf_counter() - self._started)


def wait() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama-2-7b")
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--samples", type=int, default=64, help="rows that score the units")
    parser.add_argument("--targets", nargs="+", default=["heads", "neurons", "hidden"], help="as prune_targets")
    parser.add_argument("--new_tokens", type=int, default=64)
    parser.add_argument("--activation_checkpointing", action="store_true")
    parser.add_argument("--output", help="JSON file, beside what is printed")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        print(json.dumps(SIDES[args.side](args)))
        return
    sides = {name: _run_side(name) for name in SIDES}
    text = json.dumps(sides | {"ratios": _ratios(sides), "arguments": vars(args)}, indent=1)
    print(text)
    if args.output:
        Path(args.output).write_text(text)


def _run_side(name: str) -> dict[str, Any]:
    command = [sys.executable, __file__, *sys.argv[1:], "--side", name]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    found: dict[str, Any] = json.loads(output.splitlines()[-1])
    return found


def _ratios(sides: dict[str, dict[str, Any]]) -> dict[str, float]:
    dense, pruned = sides["lora"], sides["pruned"]
    return {key: pruned[key] / dense[key] for key in dense if isinstance(dense[key], int | float) and dense[key]}


def _dense(args: argparse.Namespace) -> LlamaForCausalLM:
    set_seed(0)
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    with torch.device(device):  # type: ignore[arg-type]
        return LlamaForCausalLM._from_config(LlamaConfig(**SHAPES[args.shape]), dtype=torch.bfloat16)


def _arguments(args: argparse.Namespace, folder: str) -> dict[str, Any]:
    return {
        "output_dir": folder,
        "max_steps": args.steps,
        "per_device_train_batch_size": args.batch_size,
        "activation_checkpointing": args.activation_checkpointing,
        "bf16": True,
        "learning_rate": 1e-4,
        "logging_steps": args.steps,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": not torch.accelerator.is_available(),
    }


def _data(args: argparse.Namespace) -> RandomTokens:
    vocabulary = LlamaConfig(**SHAPES[args.shape]).vocab_size
    return RandomTokens(max(args.samples, args.steps * args.batch_size), args.length, vocabulary)


def train_lora(args: argparse.Namespace) -> dict[str, Any]:
    model = get_peft_model(_dense(args), LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS))
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model,
            TrainingArguments(**_arguments(args, folder)),
            train_dataset=_data(args),
            data_collator=default_data_collator,
            callbacks=[clock],
        )
        trainer.train()
    peak = peak_memory_bytes(trainer.args.device)
    del trainer
    return _described(clock, peak) | _inference(model.merge_and_unload(), args)


def train_pruned(args: argparse.Namespace) -> dict[str, Any]:
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        config = APTConfig(
            **_arguments(args, folder),
            target_sparsity=0.3,
            prune_targets=args.targets,
            pruning_time="before",
            calibration_samples=args.samples,
            calibration_batch_size=1,
            num_pruning_events=3,
            pruning_end=0.25,
            lora_r=8,
            lora_alpha=16,
            lora_target_modules=TARGETS,
            distillation="none",
        )
        trainer = APTTrainer(_dense(args), config, _data(args), data_collator=default_data_collator, callbacks=[clock])
        trainer.train()
        peak = peak_memory_bytes(config.device)
        events = [json.loads(line) for line in (Path(folder) / "events.jsonl").read_text().splitlines()]
        model, sparsity = trainer.model, trainer.pruner.sparsity()
        del trainer
    measured = _described(clock, peak) | _inference(model, args) | {"sparsity": sparsity, "events": _short(events)}
    return measured | measure_speed(model, [1, 8], args.length, args.new_tokens)


def _described(clock: Clock, peak: int) -> dict[str, Any]:
    late = clock.seconds[len(clock.seconds) // 2 :]
    return {
        "step_seconds": statistics.median(late),
        "step_seconds_quartiles": statistics.quantiles(late, n=4),
        "first_steps_seconds": clock.seconds[:3],
        "peak_bytes_before_training": clock.peak_before,
        "peak_bytes_training": peak,
        "peak_bytes": max(peak, clock.peak_before),
    }


def _inference(model: Any, args: argparse.Namespace) -> dict[str, Any]:
    """Parameters, and the peak of generating for 8 prompts."""
    model.requires_grad_(False)
    if model.device.type != "cpu":
        torch.accelerator.empty_cache()
    reset_peak(model.device)
    generate_once(model, 8, args.length, args.new_tokens)
    return {"parameters": count_parameters(model), "peak_bytes_generating": peak_memory_bytes(model.device)}


def _short(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {key: event[key] for key in ("step", "kind", "seconds", "block_params", "trainable_params")}
        for event in events
    ]


SIDES = {"lora": train_lora, "pruned": train_pruned}

if __name__ == "__main__":
    main()
