"""Whether a run that is killed, stopped or poisoned ends as the undisturbed one: real processes and signals.

    python scripts/fault_test.py --kills 20 --seed 1 [--processes 2] [--faults sigterm disk nan hang] [--output DIR]

Trains a tiny model with ``apt-trainer train`` once undisturbed. Then, for each fault, starts the same run in a fresh
folder, strikes one rank at a random moment, restarts until the run ends, and compares: plan, config, events and
weights have to be equal bit by bit, every checkpoint that counts as whole has to equal the undisturbed one,
and nothing temporary may be left. Prints a table; exit code 1 if a row is not as it should be. Moments are found from
outside, by what a run prints and which folders appear. Not for faults of the machine itself, such as lost power.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

import apt_trainer.run  # noqa: F401 - imported before processes are forked
from apt_trainer import cli
from apt_trainer.callback import MethodCallback
from apt_trainer.checkpoint import check_complete
from apt_trainer.errors import UserError
from apt_trainer.report.events import read_events
from apt_trainer.whole_checkpoints import STAGED

WORDS = [f"w{i}" for i in range(60)]
STEPS, SAVE_EVERY = 24, 4
KILLS = ("step", "event", "save")
OTHERS = ("sigterm", "disk", "nan", "hang")
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
HANG_TIMEOUT = 10  # seconds, as ddp_timeout, where a rank hangs
TERMINATED = 128 + signal.SIGTERM
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
    """Where the recipe and the undisturbed run are, and how long each of its steps took."""

    folder: Path
    processes: int
    events: tuple[int, ...] = ()
    gaps: tuple[float, ...] = ()

    @property
    def reference(self) -> Path:
        return self.folder / "reference"


@dataclass
class Row:
    """One fault and what came of it; ``problems`` is empty where all was as it should be."""

    fault: str
    moment: str
    rank: str
    code: int = 0
    resumed: list[int] = field(default_factory=list)
    cut_off: int = 0
    equal: bool = False
    said: str = ""
    problems: list[str] = field(default_factory=list)


class Run:
    """One start of the command on all its processes. What they print goes to a file, which is read as it grows.

    Each is forked from this process, which has imported everything: starting Python takes longer than the run.
    """

    def __init__(self, words: Sequence[str], log: Path, processes: int, setup_child: Callable[[int], None]) -> None:
        self.lines: list[str] = []
        self.times: list[float] = []
        self.codes: dict[int, int] = {}
        log.write_bytes(b"")
        self._log, self._torn = log.open("rb"), b""
        port = _free_port()
        self.pids = []
        for rank in range(processes):
            sys.stdout.flush()
            pid = os.fork()
            if pid == 0:
                _be_rank(rank, processes, port, log, words, setup_child)
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
            if "'loss':" in self.lines[-1]:
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
    rank: int, processes: int, port: int, log: Path, words: Sequence[str], setup_child: Callable[[int], None]
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
        if processes > 1:
            names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
            os.environ |= {name: str(value) for name, value in names.items()}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
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


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# ---------------------------------------------------------------------- starting runs


def make_inputs(folder: Path, processes: int) -> None:
    """A tiny model with dropout, a tokenizer of whole words, rows and the recipe."""
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
    batch = {"per_device_train_batch_size": 8 // processes}
    (folder / "recipe.yaml").write_text(json.dumps(RECIPE | inputs | batch))  # JSON is YAML


def start(setup: Setup, output: Path, *words: str, setup_child: Callable[[int], None] = lambda rank: None) -> Run:
    """``apt-trainer train`` on the recipe; ``setup_child`` is called with its rank in each process first."""
    train = ["train", "--config", str(setup.folder / "recipe.yaml"), "--output_dir", str(output), *words]
    return Run(train, setup.folder / "log.txt", setup.processes, setup_child)


def undisturbed(folder: Path, processes: int) -> Setup:
    """Train the reference; raises RuntimeError where that fails."""
    setup = Setup(folder, processes)
    run = start(setup, setup.reference)
    if run.end() != 0 or run.steps != STEPS:
        raise RuntimeError("The undisturbed run failed:\n" + "".join(run.lines[-40:]))
    _import_what_it_did(setup.folder / "log.modules")
    events = tuple(r["step"] for r in read_events(setup.reference / "events.jsonl") if r["kind"] == "prune")
    gaps = tuple(after - before for before, after in zip(run.times, run.times[1:], strict=False))
    return Setup(folder, processes, events, (gaps[0], *gaps, gaps[-1]))


def _import_what_it_did(names: Path) -> None:
    """So that later starts are forked with it."""
    for name in names.read_text().split():
        if name.partition(".")[0] in IMPORTED and name not in sys.modules:
            with contextlib.suppress(Exception):
                importlib.import_module(name)


def go_on(setup: Setup, output: Path, row: Row) -> None:
    """Restart the command until the run ends."""
    for _ in range(3):
        run = start(setup, output, "--resume_from_checkpoint", "auto")
        code = run.end()
        row.resumed.append(STEPS - run.steps)
        if code == 0:
            return
        row.problems.append(f"a restart ended with {code}: " + " ".join(run.said() or run.lines[-3:]))


# ---------------------------------------------------------------------- comparing


def differences(setup: Setup, output: Path) -> list[str]:
    """What a finished run holds that the undisturbed one does not, or the other way round."""
    found = []
    for name in ("pruning_plan.json", "config.json"):
        texts = [
            json.loads(file.read_text()) if (file := run / name).is_file() else None for run in _both(setup, output)
        ]
        if texts[0] != texts[1]:
            found.append(f"{name} differs")
    if not (output / "model.safetensors").is_file():
        return [*found, "no model"]
    found += _other_tensors(*(run / "model.safetensors" for run in _both(setup, output)))
    records = [
        [{k: v for k, v in record.items() if k != "seconds"} for record in read_events(run / "events.jsonl")]
        for run in _both(setup, output)
    ]
    if records[0] != records[1]:
        found.append("events.jsonl differs")
    hidden = sorted(path.name for path in output.rglob(".*"))
    return found + ([f"left behind: {', '.join(hidden)}"] if hidden else [])


def check_checkpoints(setup: Setup, output: Path, row: Row) -> int:
    """Every checkpoint that counts as whole equals the undisturbed one in files and tensors; returns the last step."""
    last = 0
    for path in sorted(output.glob("checkpoint-*")):
        try:
            check_complete(path)
        except UserError:
            row.cut_off += 1
            continue
        last = max(last, int(path.name.rpartition("-")[2]))
        whole = setup.reference / path.name
        if not whole.is_dir():  # saved where a signal came
            continue
        names = {file.name for file in whole.iterdir()}
        if names - {file.name for file in path.iterdir()}:
            missing = ", ".join(sorted(names - {file.name for file in path.iterdir()}))
            row.problems.append(f"{path.name} counts as whole without {missing}")
        for file in sorted(whole.glob("*.safetensors")):
            if (path / file.name).is_file():
                row.problems += [f"{path.name}: {text}" for text in _other_tensors(file, path / file.name)]
    return last


def _both(setup: Setup, output: Path) -> tuple[Path, Path]:
    return setup.reference, output


def _other_tensors(expected: Path, got: Path) -> list[str]:
    ours, theirs = load_file(expected), load_file(got)
    if ours.keys() != theirs.keys():
        return [f"{got.name} has other tensors"]
    other = [name for name, value in ours.items() if not torch.equal(value, theirs[name])]
    return [f"{len(other)} tensors of {got.name} differ, {other[0]} first"] if other else []


# ---------------------------------------------------------------------- faults


def moment_of(setup: Setup, kind: str, output: Path, draw: random.Random) -> tuple[str, Callable[[Run], bool], float]:
    """(words, what to wait for, seconds to wait after it) of a random moment of a kind."""
    if kind == "save":
        step = draw.choice([*range(SAVE_EVERY, STEPS + 1, SAVE_EVERY), 0])
        if step == 0:
            return "save of the model", lambda run: _saves_the_model(output), draw.uniform(0, 0.1)
        folder = output / STAGED / f"checkpoint-{step}"
        return f"save at step {step}", lambda run: folder.is_dir(), draw.uniform(0, setup.gaps[min(step, STEPS - 1)])
    step = draw.choice(setup.events) - 1 if kind == "event" else draw.randrange(1, STEPS)
    words = f"event at step {step + 1}" if kind == "event" else f"step {step + 1}"
    return words, lambda run: run.steps >= step, draw.uniform(0, setup.gaps[step])


def _saves_the_model(output: Path) -> bool:
    return any(path.name != STAGED for path in output.glob(".saving-*"))


def strike(setup: Setup, name: str, kind: str, output: Path, draw: random.Random) -> Row:
    """Send a signal to one rank at a random moment; returns the row so far."""
    rank = draw.randrange(setup.processes)
    words, happened, delay = moment_of(setup, kind, output, draw)
    row = Row(name, f"{words}, {delay * 1000:.0f} ms in", str(rank))
    run = start(setup, output, *(["--ddp_timeout", str(HANG_TIMEOUT)] if name == "SIGSTOP" else []))
    if not run.wait_until(lambda: happened(run)):
        row.problems.append("the moment never came")
    time.sleep(delay)
    if rank not in run.codes:
        os.kill(run.pids[rank], getattr(signal, name))
    row.code = run.end()
    row.said = " ".join(run.said())
    if name == "SIGTERM" and row.code != TERMINATED:
        row.problems.append(f"exit code {row.code} instead of {TERMINATED}: " + "".join(run.lines[-3:]).strip())
    if name == "SIGSTOP" and (row.code in (0, 137) or not row.said):
        row.problems.append("no clear error: " + "".join(run.lines[-3:]).strip())
    return row


def poison(setup: Setup, output: Path, draw: random.Random) -> Row:
    """One gradient of one rank is not a number in one step, right before a checkpoint is due or elsewhere."""
    rank, step = draw.randrange(setup.processes), draw.choice([2 * SAVE_EVERY, draw.randrange(SAVE_EVERY + 1, STEPS)])

    def poisoned(own: int) -> None:
        if own == rank:
            _poison_step(step)

    run = start(setup, output, setup_child=poisoned)
    row = Row("NaN gradient", f"step {step}", str(rank), run.end())
    row.said = " ".join(run.said())
    if row.code == 0 or "finite" not in row.said:
        row.problems.append(f"exit code {row.code} without a clear error: " + "".join(run.lines[-3:]).strip())
    return row


def _poison_step(step: int) -> None:
    """Have the gradient of the first trained parameter be NaN in one step of this process."""
    begin = MethodCallback.on_step_begin

    def begin_poisoned(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        begin(self, args, state, control, **kwargs)
        if state.global_step + 1 == step:
            parameter = next(p for p in self.trainer.model.parameters() if p.requires_grad)
            parameter.register_hook(lambda gradient: torch.full_like(gradient, float("nan")))

    MethodCallback.on_step_begin = begin_poisoned  # type: ignore[method-assign]


@contextlib.contextmanager
def full_disk(setup: Setup, output: Path, draw: random.Random) -> Iterator[Row]:
    """The disk fills up during a save; in the body there is space again. Without root: files may not grow so large."""
    whole = sorted(setup.reference.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    kept, share = draw.randrange(1, len(whole) - 1), draw.uniform(0.1, 0.9)
    sizes = [sum(file.stat().st_size for file in path.iterdir()) for path in whole]
    size = int(sum(sizes[:kept]) + share * sizes[kept]) + 40_000
    output.mkdir()
    options = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(output)]
    mounted = os.geteuid() == 0 and subprocess.run(options, check=False, stderr=subprocess.DEVNULL).returncode == 0
    limit = None if mounted else max(file.stat().st_size for file in whole[0].iterdir()) // 2

    def limit_files(own: int) -> None:
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    run = start(setup, output, setup_child=limit_files)
    row = Row(
        "disk full" if mounted else "file too large", f"after {size if mounted else limit} bytes", "0", run.end()
    )
    row.said = " ".join(run.said())
    if row.code == 0 or not row.said:
        row.problems.append(f"exit code {row.code} without a clear error: " + "".join(run.lines[-3:]).strip())
    try:
        if mounted:
            subprocess.run(["mount", "-o", "remount,size=1g", str(output)], check=True)
        yield row
    finally:
        if mounted:
            subprocess.run(["umount", str(output)], check=True)


@contextlib.contextmanager
def struck(setup: Setup, fault: str, output: Path, draw: random.Random) -> Iterator[Row]:
    """The first start of a run, with its fault; in the body the fault is over."""
    if fault == "disk":
        with full_disk(setup, output, draw) as row:
            yield row
    elif fault == "nan":
        yield poison(setup, output, draw)
    elif fault in KILLS:
        yield strike(setup, "SIGKILL", fault, output, draw)
    else:
        yield strike(setup, {"sigterm": "SIGTERM", "hang": "SIGSTOP"}[fault], "step", output, draw)


def test_fault(setup: Setup, fault: str, output: Path, draw: random.Random) -> Row:
    """One row: strike, look at what is left, go on, compare."""
    with struck(setup, fault, output, draw) as row:
        last = check_checkpoints(setup, output, row)
        if fault == "sigterm":
            row.problems += [] if last else ["no checkpoint was saved"]
        go_on(setup, output, row)
        if row.resumed[0] != last:
            row.problems.append(f"went on from {row.resumed[0]} instead of {last}")
        found = differences(setup, output)
    row.equal = not found
    row.problems += found
    if not row.problems:
        shutil.rmtree(output, ignore_errors=True)
    return row


# ---------------------------------------------------------------------- table


def table(rows: Sequence[Row]) -> str:
    """Markdown."""
    lines = ["| fault | moment | rank | exit code | resumed from | equal | said |", "|---|---|---|---:|---:|---|---|"]
    for row in rows:
        resumed, equal = ", ".join(map(str, row.resumed)), "yes" if row.equal else "no"
        lines.append(f"| {row.fault} | {row.moment} | {row.rank} | {row.code} | {resumed} | {equal} | {row.said} |")
    equal, cut_off = sum(row.equal for row in rows), sum(row.cut_off for row in rows)
    good = sum(not row.problems for row in rows)
    lines += ["", f"{len(rows)} faults: {equal} equal to the undisturbed run, {good} without any remark."]
    lines.append(f"{cut_off} checkpoints were cut off; none of them was resumed from.")
    lines += [f"- {row.fault}, {row.moment}, rank {row.rank}: {text}" for row in rows for text in row.problems]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=6, help="SIGKILLs, in turn at a step, an event and a save")
    parser.add_argument("--seed", type=int, default=0, help="of ranks and moments")
    parser.add_argument("--processes", type=int, choices=(1, 2), default=1)
    parser.add_argument("--faults", nargs="*", choices=OTHERS, default=[], help="others, one of each")
    parser.add_argument("--output", type=Path, help="keep runs here that were not equal, and the table")
    args = parser.parse_args()
    if "hang" in args.faults and args.processes == 1:
        parser.error("--faults hang needs --processes 2: one process waits for nobody")
    draw, rows = random.Random(args.seed), []
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.output or Path(scratch)
        if folder.is_dir() and any(folder.iterdir()):
            parser.error(f"{folder} is not empty")
        folder.mkdir(parents=True, exist_ok=True)
        make_inputs(folder, args.processes)
        setup = undisturbed(folder, args.processes)
        faults = [KILLS[i % len(KILLS)] for i in range(args.kills)] + args.faults
        for number, fault in enumerate(faults):
            started = time.monotonic()
            rows.append(test_fault(setup, fault, folder / f"{number:03}_{fault}", draw))
            marks = "; ".join(rows[-1].problems) or "as it should be"
            print(f"{number + 1}/{len(faults)} {fault}: {marks} ({time.monotonic() - started:.0f} s)", file=sys.stderr)
        text = table(rows)
        if args.output:
            (folder / "table.md").write_text(text + "\n")
    print(text)
    return int(any(row.problems for row in rows))


if __name__ == "__main__":
    sys.exit(main())
