"""Whether a run that is killed, stopped or poisoned ends as the undisturbed one: real processes and signals.

    python scripts/fault_test.py --kills 20 --seed 1 [--processes 2] [--faults sigterm disk nan hang] [--output DIR]
    python scripts/fault_test.py --kills 20 --seed 1 --processes 2 --engine zero3          # or zero2, fsdp2

Trains a tiny model with ``apt-trainer train`` once undisturbed. Then, for each fault, starts the same run in a fresh
folder, strikes one rank at a random moment, restarts until the run ends, and compares: plan, config, events and
weights have to be equal bit by bit under every engine, every checkpoint that counts as whole has to equal the
undisturbed one, and nothing temporary may be left. Prints a table; exit code 1 if a row is not as it should be.
Moments are found from outside, by what a run prints and which folders appear. Not for faults of the machine itself,
such as lost power.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from fault_runs import ENGINES, SAVE_EVERY, STEPS, Run, Setup, make_inputs, start, undisturbed
from safetensors.torch import load_file

from apt_trainer.errors import UserError
from apt_trainer.store.events import read_events
from apt_trainer.training.callback import MethodCallback
from apt_trainer.training.checkpoints.state import check_complete
from apt_trainer.training.checkpoints.whole import STAGED

KILLS = ("step", "event", "save")
OTHERS = ("sigterm", "disk", "nan", "hang")
HANG_TIMEOUT = 10  # seconds, as ddp_timeout, where a rank hangs
TERMINATED = 128 + signal.SIGTERM


@dataclass
class Row:
    """One fault and what came of it.

    ``distance``: relative, of the number farthest from that of the undisturbed run; ``problems``: empty where all was
    as it should be.
    """

    fault: str
    moment: str
    rank: str
    code: int = 0
    resumed: list[int] = field(default_factory=list)
    cut_off: int = 0
    distance: float = math.inf
    said: str = ""
    problems: list[str] = field(default_factory=list)


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


def compare(setup: Setup, output: Path, row: Row) -> None:
    """Note how far a finished run is from the undisturbed one, and whatever is more than that."""
    if not (output / "model.safetensors").is_file():
        row.problems.append("no model")
        return
    distances = {
        name: _distance(*(json.loads((run / name).read_text()) for run in _both(setup, output)))
        for name in ("pruning_plan.json", "config.json")
    }
    distances["events.jsonl"] = _distance(*(_events(run) for run in _both(setup, output)))
    weights = [load_file(run / "model.safetensors") for run in _both(setup, output)]
    distances["model.safetensors"] = _distance(*weights)
    row.distance = max(distances.values())
    row.problems += [f"{name} differs, by {distance:.1e}" for name, distance in distances.items() if distance > 0]
    hidden = sorted(path.name for path in output.rglob(".*"))
    row.problems += [f"left behind: {', '.join(hidden)}"] if hidden else []


def _events(run: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in record.items() if k != "seconds"} for record in read_events(run / "events.jsonl")]


def _distance(expected: Any, got: Any) -> float:
    """Largest relative difference of the numbers in two values of the same form; infinite where they have another."""
    if isinstance(expected, dict) and isinstance(got, dict) and expected.keys() == got.keys():
        return max((_distance(value, got[key]) for key, value in expected.items()), default=0.0)
    if isinstance(expected, list) and isinstance(got, list) and len(expected) == len(got):
        return max((_distance(*pair) for pair in zip(expected, got, strict=True)), default=0.0)
    if torch.is_tensor(expected) and expected.shape == got.shape:
        apart = torch.where(expected == got, 0.0, (expected - got).abs() / expected.abs())
        return float(apart.max()) if len(apart) else 0.0
    if isinstance(expected, float) and isinstance(got, float):
        return 0.0 if expected == got else abs(expected - got) / abs(expected) if expected else math.inf
    return 0.0 if expected == got else math.inf


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
    """The gradients of one rank are no numbers in one step, right before a checkpoint is due or elsewhere."""
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
    """Have the gradient of the logits be NaN in one step of this process, and so all that follow from it; parameters
    have none of their own to spoil where an engine splits them."""
    begin = MethodCallback.on_step_begin

    def poison_logits(model: Any, inputs: Any, output: Any) -> None:
        handles.pop().remove()
        output.logits.register_hook(lambda gradient: torch.full_like(gradient, float("nan")))

    def begin_poisoned(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        begin(self, args, state, control, **kwargs)
        if state.global_step + 1 == step:
            handles.append(self.trainer.model.register_forward_hook(poison_logits))

    handles: list[Any] = []
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
        compare(setup, output, row)
    if not row.problems:
        shutil.rmtree(output, ignore_errors=True)
    return row


# ---------------------------------------------------------------------- table


def table(rows: Sequence[Row]) -> str:
    """Markdown."""
    lines = ["| fault | moment | rank | exit code | resumed from | equal | said |", "|---|---|---|---:|---:|---|---|"]
    for row in rows:
        resumed = ", ".join(map(str, row.resumed))
        equal = "bit by bit" if row.distance == 0 else f"no, {row.distance:.1e} apart"
        lines.append(f"| {row.fault} | {row.moment} | {row.rank} | {row.code} | {resumed} | {equal} | {row.said} |")
    equal, cut_off = sum(row.distance == 0 for row in rows), sum(row.cut_off for row in rows)
    good = sum(not row.problems for row in rows)
    lines += ["", f"{len(rows)} faults: {equal} equal to the undisturbed run bit by bit, {good} without any remark."]
    lines.append(f"{cut_off} checkpoints were cut off; none of them was resumed from.")
    lines += [f"- {row.fault}, {row.moment}, rank {row.rank}: {text}" for row in rows for text in row.problems]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=6, help="SIGKILLs, in turn at a step, an event and a save")
    parser.add_argument("--seed", type=int, default=0, help="of ranks and moments")
    parser.add_argument("--processes", type=int, choices=(1, 2), default=1)
    parser.add_argument("--engine", choices=ENGINES, default="ddp", help="all on CPUs")
    parser.add_argument("--faults", nargs="*", choices=(*KILLS, *OTHERS), default=[], help="more, one of each")
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
        setup = Setup(folder, args.processes, args.engine)
        make_inputs(setup)
        setup = undisturbed(setup)
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
