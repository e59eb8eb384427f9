"""One recipe under several engines, beside the run of one process: are they equal, and what do events cost?

    python scripts/measure_engines.py --model minilm                # DDP, ZeRO-1, -2, -3, two processes on a CPU
    python scripts/measure_engines.py --model smollm2
    python scripts/measure_engines.py --profiles zero2 zero3 --processes 1 --bf16        # on an accelerator
    python scripts/measure_engines.py --memory --profiles ddp_cpu zero2_cpu zero3_cpu fsdp2_cpu

Every run sees the same rows in the same order, prunes early and distils from itself. Prints a table: the largest
relative difference of the loss curve and of the logits of the finished model, whether the same units were kept,
seconds of a step, of a pruning event, of a checkpoint, and the share of the steps that reductions of scores take.
With ``--memory``, instead of the seconds, bytes of live tensors in one process: before, at the most during and after
the change of shape that takes most above both, how much that is, and what the largest layer would take. Data as the
recipes. Not for speed: on one machine the processes share its cores.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from event_memory import ChangeOfShape, watch_changes

from apt_trainer import APTTrainer
from apt_trainer.cli.launch import count_processes, launch_environment, profile_path, read_profile
from apt_trainer.measure import example_inputs
from apt_trainer.runs import run
from apt_trainer.settings import ModelSettings, resolve_path
from apt_trainer.settings.recipe import load_recipe, read_values
from apt_trainer.store.pretrained import load_saved
from apt_trainer.training.between_steps import BetweenSteps

ROOT = Path(__file__).resolve().parents[1]
ROWS_PER_STEP = 8
COMMON: dict[str, Any] = {
    "max_steps": 48,
    "train_sampling_strategy": "random",
    "logging_steps": 1,
    "save_strategy": "steps",
    "save_steps": 16,
    "measure_latency": False,
    "pruning_time": "early",
    "pruning_start": 8,
    "pruning_end": 32,
    "num_pruning_events": 3,
    "mask_window": 4,
    "distillation": "self",
    "distillation_end": None,
    "max_test_samples": 64,
    "report_to": "none",
    "disable_tqdm": True,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "minilm": ("minilm/sst2.yaml", {"max_train_samples": 1000}),
    "smollm2": (
        "smollm2/gsm8k.yaml",
        {
            "task": "language_modeling",
            "template": None,
            "train_file": "../shared/data/wikitext2/valid.txt",
            "test_file": "../shared/data/wikitext2/test.txt",
            "max_length": 32,
            "max_steps": 24,
            "save_steps": 8,
            "pruning_start": 4,
            "pruning_end": 16,
            "max_test_samples": 8,
            "dtype": "float32",
            "learning_rate": 1e-4,
            "lr_scheduler_type": "linear",
            "lm_eval_tasks": [],
        },
    ),
}
"""Recipe that a model is trained with, and what changes for this."""
COLUMNS: dict[str, Callable[[Any], str]] = {
    "profile": str,
    "engine": str,
    "loss": "{:.1e}".format,
    "same units": {True: "yes", False: "no"}.__getitem__,
    "logits": "{:.1e}".format,
}
OF_TIME: dict[str, Callable[[Any], str]] = {
    "step": "{:.3f} s".format,
    "event": "{:.2f} s".format,
    "checkpoint": "{:.2f} s".format,
    "reductions": "{:.1%}".format,
}
OF_MEMORY: dict[str, Callable[[Any], str]] = {
    name: lambda number: f"{number / 1e6:.1f} MB" for name in ("before", "most", "after", "more", "layer")
}
"""Name of a column, which is that of the measure too → how it is printed."""


SECONDS: dict[str, list[float]] = {}
"""What they were spent on → seconds."""


class TimedBetweenSteps(BetweenSteps):
    """Notes seconds, each from a moment on when all processes have arrived there."""

    def before_step(self) -> None:
        self._began = time.perf_counter()
        super().before_step()

    def after_step(self) -> None:
        SECONDS.setdefault("step", []).append(time.perf_counter() - self._began)
        super().after_step()

    def _change_shape(self, *args: Any, **kwargs: Any) -> None:
        timed("event", lambda: super(TimedBetweenSteps, self)._change_shape(*args, **kwargs))

    def _sum_over_processes(self, tensor: torch.Tensor) -> torch.Tensor:
        return timed("reduction", lambda: super(TimedBetweenSteps, self)._sum_over_processes(tensor))


class TimedTrainer(APTTrainer):
    """Notes the seconds of checkpoints too."""

    def _set_up(self) -> None:
        super()._set_up()
        self.between_steps = TimedBetweenSteps(self)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        timed("checkpoint", lambda: super(TimedTrainer, self)._save_checkpoint(*args, **kwargs))


def timed(name: str, work: Callable[[], Any]) -> Any:
    """What ``work`` gives, once all processes are here."""
    if dist.is_initialized():
        dist.barrier()
    started = time.perf_counter()
    result = work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    SECONDS.setdefault(name, []).append(time.perf_counter() - started)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="minilm")
    parser.add_argument("--profiles", nargs="+", default=["ddp_cpu", "zero1_cpu", "zero2_cpu", "zero3_cpu"])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--memory", action="store_true", help="bytes at changes of shape instead of seconds")
    parser.add_argument("--output", help="JSON file, beside what is printed")
    parser.add_argument("--worker", metavar="RECIPE", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(Path(args.worker), args.memory)
        return
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(args, Path(folder))
    _print(rows, COLUMNS | (OF_MEMORY if args.memory else OF_TIME))
    if args.output:
        Path(args.output).write_text(json.dumps(rows, indent=1))


def work(recipe: Path, memory: bool) -> None:
    """What every process of a run does."""
    changes: list[ChangeOfShape] = []
    if memory:
        changes = watch_changes()
    else:
        run.APTTrainer = TimedTrainer  # type: ignore[misc]
    loaded = load_recipe(str(recipe))
    run.train(loaded)
    if memory:
        described = [asdict(change) | {"more": change.more} for change in changes]
        (recipe.parent / f"memory.{loaded.training.process_index}.json").write_text(json.dumps(described))
    elif loaded.training.should_save:
        (recipe.parent / "seconds.json").write_text(json.dumps(SECONDS))


def measure(args: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    recipe = _recipe(args, folder)
    rows, first = [], None
    for profile in ("one process", *args.profiles):
        place = folder / profile.replace(" ", "_")
        place.mkdir()
        alone = profile == "one process"
        file = place / "recipe.json"
        size = ROWS_PER_STEP // (1 if alone else args.processes)
        file.write_text(json.dumps(recipe | {"output_dir": str(place / "run"), "per_device_train_batch_size": size}))
        asked = ["--worker", str(file), *(["--memory"] if args.memory else [])]
        command = [sys.executable, __file__, *asked]
        environment = {"OMP_NUM_THREADS": "1", **os.environ}
        if not alone:
            config = profile_path(profile)
            content = read_profile(config)
            number = count_processes(config, content, args.processes)
            command = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", "--config_file", str(config)]
            command += ["--num_processes", str(number), __file__, *asked]
            environment = launch_environment(content, number)
        subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
        first = first or place
        engine = json.loads((place / "run" / "metrics.json").read_text())["engine"]
        measured = _bytes(place) if args.memory else _seconds(place)
        rows.append({"profile": profile, "engine": engine} | _differences(first, place) | measured)
    return rows


def _recipe(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    name, changes = MODELS[args.model]
    given = read_values(str(ROOT / "recipes" / name)) | COMMON | changes
    given |= {"use_cpu": not torch.accelerator.is_available(), "bf16": args.bf16}
    if args.model == "minilm":  # without dropout, whose random numbers differ from process to process
        model = folder / "model"
        shutil.copytree(resolve_path(given["model_name_or_path"]), model)
        config = json.loads((model / "config.json").read_text())
        config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        (model / "config.json").write_text(json.dumps(config))
        given["model_name_or_path"] = str(model)
    return given


def _differences(first: Path, other: Path) -> dict[str, Any]:
    curves = [_losses(place / "run" / "trainer_state.json") for place in (first, other)]
    plans = [json.loads((place / "run" / "pruning_plan.json").read_text()) for place in (first, other)]
    logits = [_logits(place / "run") for place in (first, other)] if plans[0] == plans[1] else None
    return {
        "loss": max(abs(a - b) / abs(a) for a, b in zip(*curves, strict=True)),
        "same units": plans[0] == plans[1],
        "logits": None if logits is None else float((logits[0] - logits[1]).norm() / logits[0].norm()),
    }


def _losses(state: Path) -> list[float]:
    return [line["loss"] for line in json.loads(state.read_text())["log_history"] if "loss" in line]


@torch.no_grad()
def _logits(path: Path) -> torch.Tensor:
    model = load_saved(ModelSettings(str(path))).eval()
    return model(**example_inputs(model, 4, 32)).logits.float()  # type: ignore[no-any-return]


def _seconds(place: Path) -> dict[str, Any]:
    seconds = json.loads((place / "seconds.json").read_text())
    return {
        "step": statistics.median(seconds["step"]),
        "event": statistics.median(seconds["event"]),
        "checkpoint": statistics.median(seconds["checkpoint"]),
        "reductions": sum(seconds.get("reduction", [])) / sum(seconds["step"]),
    }


def _bytes(place: Path) -> dict[str, Any]:
    """Of the change of shape, in all processes, that takes most above what is there anyway."""
    changes = [change for file in sorted(place.glob("memory.*.json")) for change in json.loads(file.read_text())]
    worst: dict[str, Any] = max(changes, key=lambda change: change["more"])
    return worst


def _print(rows: list[dict[str, Any]], columns: dict[str, Callable[[Any], str]]) -> None:
    print(f"| {' | '.join(columns)} |")
    print(f"|---|---|{'---:|' * (len(columns) - 2)}")
    for row in rows:
        print(f"| {' | '.join('' if row[name] is None else form(row[name]) for name, form in columns.items())} |")


if __name__ == "__main__":
    main()
