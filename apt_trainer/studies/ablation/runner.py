"""Run a study: each variant and seed in a process and folder of its own, continued where it was left.

What is done is read from the folders, so a study may be killed at any moment and started again. Results are kept in
one JSON lines file, replaced as a whole. Not for several machines.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from apt_trainer.errors import UserError, unknown_choice
from apt_trainer.report.comparison import read_json, run_record
from apt_trainer.store.events import (
    METRICS_FILE,
    RECIPE_FILE,
    RESULTS_FILE,
    append_event,
    read_events,
    write_json,
)
from apt_trainer.store.lock import FolderLock
from apt_trainer.studies.ablation.order import find_needs, name_of
from apt_trainer.studies.ablation.study import Run, Study

LOG_LINES = 15
POLL_SECONDS, STOP_SECONDS = 0.2, 10
_PR_SET_PDEATHSIG = 1  # prctl(2)
_Results = dict[tuple[str, int], dict[str, Any]]


def run_study(
    study: Study,
    jobs: int = 1,
    tell: Callable[[str], object] = lambda line: None,
    variants: Sequence[str] | None = None,
) -> dict[str, str]:
    """Run what is not finished yet, ``jobs`` runs at a time; finished runs are skipped, begun ones resumed.

    A run starts once those that it needs have finished, and not at all where one of them failed.

    Args:
        study: As :func:`~apt_trainer.studies.ablation.study.read_study` reads it.
        jobs: Runs at a time.
        tell: Takes a line about what happens.
        variants: Run these alone, and what they need. Default: all.

    Returns:
        The end of the log of each run that failed, or why it was not started; empty if all have finished.

    Raises:
        UserError: before anything runs, if the folder holds something else or is in use, runs need each other, or for
            an unknown variant.
    """
    if jobs < 1:
        raise UserError(f"jobs={jobs} must be at least 1.")
    needs = find_needs(study)
    asked = study.runs if variants is None else _with_needs(study, variants, needs)
    study.output_dir.mkdir(parents=True, exist_ok=True)
    failures: dict[str, str] = {}
    running: dict[subprocess.Popen[bytes], Run] = {}
    with FolderLock(study.output_dir, patience=0) as lock:
        results = _read_results(study)
        done = {run for run in study.runs if _is_finished(run)}
        waiting = [run for run in asked if run not in done]
        _add_results(study, results, [run for run in study.runs if run in done])
        tell(f"{len(asked)} runs, {len(asked) - len(waiting)} of them finished earlier")
        try:
            while waiting or running:
                _give_up(waiting, needs, failures, tell)
                ready = [run for run in waiting if done.issuperset(needs[run])]
                for run in ready[: jobs - len(running)]:
                    waiting.remove(run)
                    running[_start(run, jobs, lock.handles)] = run
                    tell(f"{name_of(run)}: started; log in {_log(run)}")
                for process in [process for process in running if process.poll() is not None]:
                    run = running.pop(process)
                    if (run.folder / METRICS_FILE).is_file():
                        done.add(run)
                        _add_results(study, results, [run])
                        tell(f"{name_of(run)}: finished")
                    else:
                        lines = _log(run).read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_LINES:]
                        failures[name_of(run)] = "\n".join(lines)
                        tell(f"{name_of(run)}: failed with exit code {process.returncode}")
                time.sleep(POLL_SECONDS if running else 0)
        finally:
            _stop(list(running))
    return failures


def _with_needs(study: Study, variants: Sequence[str], needs: Mapping[Run, list[Run]]) -> list[Run]:
    """Runs of ``variants`` and, in turn, those whose results they read."""
    known = {run.variant for run in study.runs}
    for variant in variants:
        if variant not in known:
            raise unknown_choice("variant", variant, sorted(known))
    found = {run for run in study.runs if run.variant in variants}
    while more := {need for run in found for need in needs[run]} - found:
        found |= more
    return [run for run in study.runs if run in found]


def _give_up(
    waiting: list[Run], needs: Mapping[Run, list[Run]], failures: dict[str, str], tell: Callable[[str], object]
) -> None:
    """Move runs that need one that failed from ``waiting`` to ``failures``."""
    for run in list(waiting):
        failed = " and ".join(name for name in map(name_of, needs[run]) if name in failures)
        if failed:
            waiting.remove(run)
            failures[name_of(run)] = f"Not started: it needs the result of {failed}, which failed."
            tell(f"{name_of(run)}: not started, for {failed} failed")


def _read_results(study: Study) -> _Results:
    path, results = study.output_dir / RESULTS_FILE, {}
    digests = {(run.variant, run.seed): run.digest for run in study.runs}
    for record in read_events(path):
        key = record.get("variant"), record.get("seed")
        if key not in digests or digests[key] != record.get("recipe_digest"):
            raise UserError(
                f"{path} is of another study: {study.path} has no variant {key[0]!r} with seed {key[1]}, or gives it "
                "another recipe. Choose another output_dir, or move this one away."
            )
        results[key] = record
    return results


def _add_results(study: Study, results: _Results, runs: list[Run]) -> None:
    for run in runs:
        record = run_record(run.folder, run.variant) | {"seed": run.seed, "recipe_digest": run.digest}
        results[run.variant, run.seed] = record | {"baseline": study.baseline, "shown": study.metrics}
    path, new = study.output_dir / RESULTS_FILE, study.output_dir / f".{RESULTS_FILE}.new"
    new.unlink(missing_ok=True)
    for key in [(run.variant, run.seed) for run in study.runs]:
        if key in results:
            append_event(new, results[key])
    if results:
        os.replace(new, path)


def _is_finished(run: Run) -> bool:
    """Whether the run has its metrics; raises :class:`UserError` if its folder holds another run, finished or not."""
    finished, recipe = (run.folder / METRICS_FILE).is_file(), run.folder / RECIPE_FILE
    if finished or recipe.is_file():
        there, absent = read_json(recipe), object()
        keys = {*there, *run.given} - {"output_dir", "resume_from_checkpoint"}
        other = sorted(key for key in keys if there.get(key, absent) != run.given.get(key, absent))
        if other:
            raise UserError(
                f"{run.folder} holds a run with another recipe; different: {', '.join(other)}. "
                "Choose another output_dir, or remove that folder to run it anew."
            )
    return finished


def _start(run: Run, jobs: int, locks: tuple[int, ...]) -> subprocess.Popen[bytes]:
    for checkpoint in run.folder.glob("checkpoint-*"):
        if not (checkpoint / "trainer_state.json").is_file():  # written last: the run was killed while saving
            shutil.rmtree(checkpoint)
    resume = run.command.resume(run.folder)
    if run.folder.exists() and resume is None:
        shutil.rmtree(run.folder)
    if not run.command.writes_recipe:
        write_json(run.folder / RECIPE_FILE, run.given)
    _log(run).parent.mkdir(parents=True, exist_ok=True)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    words = [*run.words, *(resume or [])]
    with _log(run).open("wb" if resume is None else "ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "apt_trainer", run.command.name, *words],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={"OMP_NUM_THREADS": str(max(1, cores // jobs)), **os.environ},
            pass_fds=locks,  # the folder stays locked while a run lives, should this process be killed
            start_new_session=True,
            preexec_fn=_die_with_parent if sys.platform == "linux" else None,
        )


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _stop(processes: list[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        process.terminate()
    for process in processes:
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()


def _log(run: Run) -> Path:
    return run.folder.with_name(f"{run.folder.name}.log")
