"""Starts, watches and restarts real runs of ``apt-trainer train`` on a tiny model, for ``fault_test.py``.

Each process of a run is forked from the script, which has imported everything: starting Python takes longer than the
run. Not for faults and not for comparing what runs leave (``fault_test.py``), nor for launchers, which are left out.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import random
import re
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

import apt_trainer.runs.run  # noqa: F401 - imported before processes are forked
from apt_trainer import cli
from apt_trainer.store.events import read_events
from apt_trainer.training import progress

WORDS = [f"w{i}" for i in range(60)]
STEPS, SAVE_EVERY = 24, 4
_OF_A_STEP = re.compile(r"step \d+ of \d+ · loss ")
DEEPSPEED = "deepspeed.json"
FSDP: dict[str, Any] = {"fsdp": True, "fsdp_config": {"version": 2}}
ENGINES = {"ddp": {}, "zero2": {"deepspeed": DEEPSPEED}, "zero3": {"deepspeed": DEEPSPEED}, "fsdp2": FSDP}
"""Engine → what a recipe says to have it."""
IMPORTED = (
    "apt_trainer",
    "accelerate",
    "datasets",
    "deepspeed",
    "matplotlib",
    "peft",
    "sklearn",
    "torch",
    "transformers",
)
PATIENCE = 120.0  # seconds for one start
GRACE = 20.0  # seconds, for the others once a rank has ended
RECIPE: dict[str, Any] = {
    "task": "classification",
    "max_length": 16,
    "target_sparsity": 0.5,
    "pruning_start": 3,
    "pruning_end": 15,
    "num_pruning_events": 4,
    "mask_window": 2,
    "distillation": "self",
    "distillation_end": 19,
    "tune_after_distillation": "full",
    "round_to": 4,
    "min_hidden": 16,
    "lora_r": 2,
    "lora_alpha": 4,
    "max_rank": 8,
    "max_steps": STEPS,
    "save_strategy": "steps",
    "save_steps": SAVE_EVERY,
    "per_device_eval_batch_size": 16,
    "learning_rate": 1e-3,
    "logging_steps": 1,
    "disable_tqdm": True,
    "measure_latency": False,
    "report_to": [],
    "use_cpu": True,
    "seed": 7,
}


@dataclass(frozen=True)
class Setup:
    """Where the recipe and the undisturbed run are, and how long each of its steps took.

    ``engine``: of :data:`ENGINES`; "ddp" with one process is no engine at all.
    """

    folder: Path
    processes: int
    engine: str = "ddp"
    events: tuple[int, ...] = ()
    gaps: tuple[float, ...] = ()

    @property
    def reference(self) -> Path:
        return self.folder / "reference"


class Run:
    """One start of the command on all its processes. What they print goes to a file, which is read as it grows.

    Each is forked from this process, which has imported everything: starting Python takes longer than the run.
    """

    def __init__(
        self, words: Sequence[str], log: Path, variables: Mapping[str, str], setup_child: Callable[[int], None]
    ) -> None:
        """``variables`` of the environment say how many processes there are; ``setup_child`` is called in each."""
        self.lines: list[str] = []
        self.times: list[float] = []
        self.codes: dict[int, int] = {}
        log.write_bytes(b"")
        self._log, self._torn = log.open("rb"), b""
        self.pids = []
        for rank in range(int(variables.get("WORLD_SIZE", "1"))):
            sys.stdout.flush()
            pid = os.fork()
            if pid == 0:
                _be_rank(rank, variables, log, words, setup_child)
            self.pids.append(pid)

    @property
    def steps(self) -> int:
        """Steps logged by this start."""
        return len(self.times)

    def poll(self) -> bool:
        """Read what is new; whether all processes have ended."""
        *whole, self._torn = (self._torn + self._log.read()).split(b"\n")
        for line in whole:
            self.lines.append(line.decode(errors="replace"))
            if _OF_A_STEP.match(self.lines[-1]):
                self.times.append(time.perf_counter())
        for rank, pid in enumerate(self.pids):
            if rank not in self.codes:
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    code = os.waitstatus_to_exitcode(status)
                    self.codes[rank] = code if code >= 0 else 128 - code
        return len(self.codes) == len(self.pids)

    def wait_until(self, happened: Callable[[], bool]) -> bool:
        """False where the run ended first."""
        deadline = time.monotonic() + PATIENCE
        while not happened():
            if self.poll() or time.monotonic() > deadline:
                return False
            time.sleep(0.0005)
        return True

    def end(self) -> int:
        """Exit code of the first process that failed, else 0; the others have :data:`GRACE` seconds from then on, as
        under a cluster."""
        first, deadline = 0, time.monotonic() + PATIENCE
        while not self.poll() and time.monotonic() < deadline:
            failed = [code for code in self.codes.values() if code]
            if failed and not first:
                first, deadline = failed[0], time.monotonic() + GRACE
            time.sleep(0.002)
        for rank, pid in enumerate(self.pids):
            if rank not in self.codes:
                os.kill(pid, signal.SIGKILL)
        while not self.poll():
            time.sleep(0.002)
        self._log.close()
        return first or next((code for code in self.codes.values() if code), 0)

    def said(self) -> list[str]:
        """Its error messages, each once."""
        return list(dict.fromkeys(line.strip() for line in self.lines if line.startswith("error:")))


def _be_rank(
    rank: int, variables: Mapping[str, str], log: Path, words: Sequence[str], setup_child: Callable[[int], None]
) -> NoReturn:
    """What a forked process does instead of going on with the script."""
    code = 1
    try:
        os.setsid()
        file = os.open(log, os.O_WRONLY | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
        sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
        sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
        if variables:
            os.environ |= {**variables, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        progress._SHARE = 0.0  # a line for each step
        setup_child(rank)
        code = cli.main(list(words))
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1
    except BaseException:
        traceback.print_exc()
    if rank == 0:
        log.with_suffix(".modules").write_text("\n".join(sys.modules))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _variables(setup: Setup) -> dict[str, str]:
    """What a launcher would tell each process; nothing where there is one without an engine."""
    if setup.processes == 1 and not ENGINES[setup.engine]:
        return {}
    number = str(setup.processes)
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    return {"WORLD_SIZE": number, "LOCAL_WORLD_SIZE": number, "ACCELERATE_USE_CPU": "true", **meeting}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# ---------------------------------------------------------------------- starting runs


def make_inputs(setup: Setup) -> None:
    """A tiny model with dropout, a tokenizer of whole words, rows and the recipe."""
    os.environ["DS_ACCELERATOR"] = "cpu"  # read when DeepSpeed is imported, which saving a model does
    folder = setup.folder
    torch.manual_seed(0)
    special = {"pad_token": "<pad>", "unk_token": "<unk>", "cls_token": "<s>", "sep_token": "</s>"}
    tokens = {word: i for i, word in enumerate([*special.values(), *WORDS])}
    core = Tokenizer(models.WordLevel(tokens, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=core, **special).save_pretrained(folder / "model")
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64, "num_hidden_layers": 3}
    config = BertConfig(vocab_size=len(tokens), max_position_embeddings=20, pad_token_id=0, num_labels=3, **sizes)
    BertForSequenceClassification(config).save_pretrained(folder / "model")
    draw = random.Random(0)
    rows = [{"text": " ".join(draw.choices(WORDS, k=draw.randint(5, 14))), "label": i % 3} for i in range(240)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    inputs = {"model_name_or_path": str(folder / "model"), "train_file": str(folder / "rows.jsonl")}
    batch = {"per_device_train_batch_size": 8 // setup.processes}
    engine = dict(ENGINES[setup.engine])
    if "deepspeed" in engine:
        engine["deepspeed"] = str(folder / DEEPSPEED)
        (folder / DEEPSPEED).write_text(json.dumps(_deepspeed_config(int(setup.engine[-1]))))
    (folder / "recipe.yaml").write_text(json.dumps(RECIPE | inputs | batch | engine))  # JSON is YAML


def _deepspeed_config(stage: int) -> dict[str, Any]:
    """Of stage 3 with everything partitioned, however small, as in large models."""
    automatic = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size")
    return {
        **dict.fromkeys((*automatic, "gradient_clipping"), "auto"),
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 500_000, "stage3_param_persistence_threshold": 0},
    }


def start(setup: Setup, output: Path, *words: str, setup_child: Callable[[int], None] = lambda rank: None) -> Run:
    """``apt-trainer train`` on the recipe; ``setup_child`` is called with its rank in each process first."""
    train = ["train", "--config", str(setup.folder / "recipe.yaml"), "--output_dir", str(output), *words]
    return Run(train, setup.folder / "log.txt", _variables(setup), setup_child)


def undisturbed(setup: Setup) -> Setup:
    """Train the reference, and note its events and times; raises RuntimeError where that fails."""
    run = start(setup, setup.reference)
    if run.end() != 0 or run.steps != STEPS:
        raise RuntimeError("The undisturbed run failed:\n" + "\n".join(run.lines[-40:]))
    trained_by = json.loads((setup.reference / "metrics.json").read_text())["engine"]
    if trained_by != ("one process" if not _variables(setup) else setup.engine):
        raise RuntimeError(f"The undisturbed run was to be one of {setup.engine}, but was one of {trained_by}.")
    _import_what_it_did(setup.folder / "log.modules")
    events = tuple(r["step"] for r in read_events(setup.reference / "events.jsonl") if r["kind"] == "prune")
    gaps = tuple(after - before for before, after in zip(run.times, run.times[1:], strict=False))
    return replace(setup, events=events, gaps=(gaps[0], *gaps, gaps[-1]))


def _import_what_it_did(names: Path) -> None:
    """So that later starts are forked with it."""
    for name in names.read_text().split():
        if name.partition(".")[0] in IMPORTED and name not in sys.modules:
            with contextlib.suppress(Exception):
                importlib.import_module(name)
