"""Runs with random settings on tiny models: what is accepted has to hold what the README promises.

    python tests/random_runs.py --seconds 120 --seed 1
    python tests/random_runs.py --only 17              # one draw again, by its number
    python tests/random_runs.py --seconds 600 --seed 2000 --processes 3

Each draw (family, rule, budget, targets, time, schedule, tuning, distillation, optimizer, checkpointing) is refused
with a UserError before a step, or trains to its end. Then: resumed from a checkpoint at a random step it ends
bit-equal; what is left is within the budget; saved and loaded it gives equal logits, also in a process of its own (all
models at the end); every so many draws (``--processes``) two processes log the losses of one, and (``--exports``)
onnxruntime gives its logits. Prints one JSON line per draw; exit code 1 where something did not hold.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from integration.factories import SHORT, Rows, SaveAt, losses_of, make_trainer
from integration.test_zero import deepspeed_config
from safetensors.torch import load_file, save_file
from tiny import FAMILY_NAMES, LANGUAGE_MODELS, logits, tiny_batch, tiny_model
from transformers.trainer_callback import PrinterCallback

from apt_trainer import APTTrainer, UserError, load_pruned
from apt_trainer.errors import RunError
from apt_trainer.store.export import export

STEPS = int(SHORT["max_steps"])
ROWS = {"ForMaskedLM": "text", "ForCausalLM": "text", "ForConditionalGeneration": "target"}
UNEXPECTED = (RuntimeError, ValueError, TypeError, AttributeError, LookupError, AssertionError, OSError)
CLOSE = 2e-3
"""Relative difference of losses between one process and two, which add in another order."""


def draw(number: int) -> tuple[str, str, dict[str, Any], float]:
    """(family, kind of head, settings, dropout) of one draw."""
    choose = random.Random(number)
    family = choose.choice([*FAMILY_NAMES, *LANGUAGE_MODELS])
    task = LANGUAGE_MODELS.get(family, "ForSequenceClassification")
    targets = choose.choice(
        [["heads"], ["neurons"], ["heads", "neurons"], ["heads", "neurons", "hidden"], ["sublayers"], ["hidden"]]
    )
    rules = ["salience", "magnitude", "taylor", "random"] + (["cosine", "nri"] if targets == ["sublayers"] else [])
    when = choose.choice(["early", "early", "late", "before"])
    settings: dict[str, Any] = {
        **SHORT,
        "prune_targets": targets,
        "importance": choose.choice(rules),
        "pruning_time": when,
        "sparsity_metric": choose.choice(["params", "params", "flops", "memory"]),
        "target_sparsity": round(choose.uniform(0.1, 0.6), 2),
        "num_pruning_events": choose.randint(1, 3),
        "mask_window": choose.choice([0, 2, 3]),
        "tune": choose.choice(["adapters", "adapters", "adapters_and_norms", "full"]),
        "distillation": choose.choice(["self", "self", "none"]),
        "rank_growth": choose.choice(["salience", "uniform", "none"]),
        "preset_overrides": {"outlier_scaling": choose.choice(["none", "mean"])},
        "optim": choose.choice(["adamw_torch", "adamw_torch", "sgd", "adafactor"]),
        "gradient_checkpointing": choose.random() < 0.3,
        "gradient_accumulation_steps": choose.choice([1, 2]),
        "label_smoothing_factor": choose.choice([0.0, 0.0, 0.1]),
        "max_grad_norm": choose.choice([0.0, 1.0]),
        "round_to": choose.choice([1, 4]),
        "learning_rate": 1e-3,
        "calibration_samples": 16,
        "nri_cost": "params",
        "max_steps": STEPS,
    }
    if choose.random() < 0.3:
        settings["tune_after_pruning"] = "full"
    if choose.random() < 0.3:
        settings["tune_after_distillation"] = "full"
    if task == "ForConditionalGeneration":
        settings["label_smoothing_factor"] = 0.0  # asks for decoder inputs, which these rows do not bring
    if settings["distillation"] == "none":
        settings["distillation_end"] = None
    if when == "before":
        settings |= {"pruning_start": None, "distillation": "none", "distillation_end": None, "mask_window": 0}
    dropout = choose.choice([0.0, 0.1])
    if choose.random() < 0.3:
        settings["refit"] = True
    return family, task, settings, dropout


def trainer_of(
    number: int, folder: Path, saved: tuple[int, ...] = (), drops: bool = True, **changes: Any
) -> APTTrainer:
    """Trainer of one draw; without its dropout where it is not to ``drops``."""
    family, task, settings, dropout = draw(number)
    dropout = dropout if drops else 0.0
    rows = ROWS.get(task, "classification")
    data = Rows(96, rows, padded=False)
    options = {"heldout_dataset": Rows(16, rows, padded=False), "callbacks": [SaveAt(saved)]}
    trainer = make_trainer(folder, tiny_model(family, task, dropout=dropout), data, options, **{**settings, **changes})
    trainer.remove_callback(PrinterCallback)
    return trainer


def check(number: int, place: Path) -> dict[str, Any]:
    """What one draw did, with ``wrong``: sentences about what did not hold."""
    family, _, settings, dropout = draw(number)
    said: dict[str, Any] = {"draw": number, "family": family, "wrong": []}
    at = random.Random(-number).randint(1, STEPS - 1)
    try:
        whole = trainer_of(number, place / "whole", (at,))
    except UserError as error:
        return said | {"refused": str(error)}
    except UNEXPECTED as error:
        return said | {"wrong": [f"is no trainer: {type(error).__name__}: {error}"]}
    try:
        whole.train()
    except UserError as error:
        done = whole.state.global_step if whole.state is not None else 0
        wrong = [] if done == 0 else [f"refused after {done} steps: {error}"]
        return said | {"refused": str(error), "wrong": wrong}
    except UNEXPECTED as error:
        return said | {"wrong": [f"does not train: {type(error).__name__}: {error}"]}
    resumed = trainer_of(number, place / "resumed")
    shutil.copytree(place / "whole" / f"checkpoint-{at}", place / "resumed" / f"checkpoint-{at}")
    resumed.train(resume_from_checkpoint=str(place / "resumed" / f"checkpoint-{at}"))
    first, second = whole.model.state_dict(), resumed.model.state_dict()
    if first.keys() != second.keys() or not all(torch.equal(first[name], second[name]) for name in first):
        said["wrong"].append(f"resumed at step {at} it ends otherwise")
    removed = whole.pruner.sparsity()
    if removed < settings["target_sparsity"] - 1e-9:
        said["wrong"].append(f"{removed:.3f} of the budget is gone, not {settings['target_sparsity']}")
    if not all(math.isfinite(loss) for losses in losses_of(whole).values() for loss in losses):
        said["wrong"].append("a loss is not finite")
    model = whole.model.eval()
    whole.save_model(str(place / "saved"))
    batch = tiny_batch(model)
    expected = logits(model, batch)
    save_file({**batch, "expected": expected}, place / "saved" / "probe.safetensors")
    if not torch.equal(logits(loaded(place / "saved").eval(), batch), expected):
        said["wrong"].append("loaded it has other logits")
    return said | {"removed": round(removed, 3), "resumed_at": at, "dropout": dropout}


def loaded(folder: Path) -> Any:
    """The model in ``folder``, of whatever class it was saved as."""
    config = json.loads((folder / "config.json").read_text())
    if "apt_structure" in config:
        return load_pruned(folder)
    return getattr(transformers, config["architectures"][0]).from_pretrained(folder)


def check_processes(number: int, place: Path) -> list[str]:
    """Two processes with half of each batch, under DDP, ZeRO-2 or ZeRO-3, log the losses of one. Without what they do
    apart: dropout, layers mapped per micro-batch, and optimizers whose state DeepSpeed lays out flat."""
    half = ["--nproc_per_node", "2", "--master_port", "0", "--rdzv_backend", "c10d", "--rdzv_endpoint", "127.0.0.1:0"]
    command = [sys.executable, "-m", "torch.distributed.run", *half, __file__, "--worker", str(place), "--only"]
    done = subprocess.run([*command, str(number)], capture_output=True, text=True)
    if done.returncode != 0:
        return [f"two processes fail: {(done.stderr.strip().splitlines() or ['?'])[-1]}"]
    worker(number, place / "one", 8)
    one, two = (json.loads((place / name / "losses.json").read_text()) for name in ("one", "two"))
    apart = [step for step, loss in one.items() if abs(loss - two[step]) > CLOSE * max(1.0, abs(loss))]
    return [f"two processes log other losses from step {apart[0]} on"] if apart else []


def check_export(place: Path) -> list[str]:
    """What ``export`` itself finds out about the model; what it refuses is no fault."""
    try:
        export(loaded(place / "saved").eval(), "onnx", place / "onnx")
    except UserError:
        return []
    except RunError as error:
        return [str(error)]
    return []


def worker(number: int, folder: Path, batch_size: int) -> None:
    changes: dict[str, Any] = {"optim": "adamw_torch", "distillation_layer_map": "static"}
    if "WORLD_SIZE" in os.environ:
        engine = random.Random(f"engine of {number}").choice(["ddp", "zero2", "zero3"])
        changes |= {"ddp_backend": "gloo"} if engine == "ddp" else {"deepspeed": deepspeed_config(int(engine[-1]))}
    trainer = trainer_of(number, folder, drops=False, per_device_train_batch_size=batch_size, **changes)
    trainer.train()
    if trainer.is_world_process_zero():
        losses = {step: losses[0] for step, losses in losses_of(trainer).items()}
        (folder / "losses.json").write_text(json.dumps(losses))


def load_all(folders: list[Path]) -> list[str]:
    """Load every saved model in a new process, and compare its logits with those written down."""
    command = [sys.executable, __file__, "--probe", *map(str, folders)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        return [f"in a new process: {(done.stdout or done.stderr).strip().splitlines()[-1]}"]
    return []


def probe(folder: Path) -> bool:
    """Whether the model in ``folder`` gives the logits beside it."""
    batch = load_file(folder / "probe.safetensors")
    expected = batch.pop("expected")
    return torch.equal(logits(loaded(folder).eval(), batch), expected)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=120.0, help="no draw starts after that (default: 120)")
    parser.add_argument("--seed", type=int, default=1, help="number of the first draw (default: 1)")
    parser.add_argument("--only", type=int, metavar="N", help="this draw alone")
    parser.add_argument("--processes", type=int, default=0, metavar="N", help="two processes for every N-th draw")
    parser.add_argument("--exports", type=int, default=0, metavar="N", help="export every N-th draw's model to ONNX")
    parser.add_argument("--worker", metavar="DIR", help=argparse.SUPPRESS)
    parser.add_argument("--probe", metavar="DIR", nargs="+", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.worker is not None:
        worker(args.only, Path(args.worker) / "two", 4)
        return 0
    transformers.logging.set_verbosity_error()
    if args.probe:
        other = [str(folder) for folder in args.probe if not probe(folder)]
        print("other logits: " + ", ".join(other) if other else "equal logits")
        return 1 if other else 0
    started, number, wrong, refused, saved = time.monotonic(), args.seed, [], 0, []
    with tempfile.TemporaryDirectory() as place:
        while time.monotonic() - started < args.seconds:
            number = args.only if args.only is not None else number
            folder = Path(place) / str(number)
            said = check(number, folder)
            refused += "refused" in said
            if "removed" in said:
                saved.append(folder / "saved")
                if args.processes and (number - args.seed) % args.processes == 0:
                    said["wrong"] += check_processes(number, folder)
                if args.exports and (number - args.seed) % args.exports == 0:
                    said["wrong"] += check_export(folder)
            if said["wrong"]:
                wrong.append(number)
            print(json.dumps(said), flush=True)
            if args.only is not None:
                break
            number += 1
        ended = load_all(saved) if saved else []
    for sentence in ended:
        print(json.dumps({"wrong": [sentence]}))
    print(f"{len(saved)} ran, {refused} were refused, {len(wrong) + len(ended)} did not hold: {wrong}")
    return 1 if wrong or ended else 0


if __name__ == "__main__":
    raise SystemExit(main())
