"""Start a training run on several processes through ``accelerate launch``, and notice when fewer came up.

A profile is a config file of accelerate: one that comes with the package (``recipes/accelerate``) or any path. Not a
launcher of its own: processes, ports and devices are accelerate's business.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from apt_trainer.errors import UserError
from apt_trainer.settings.packages import DEEPSPEED, require
from apt_trainer.settings.shipped import PROFILES

EXPECTED_PROCESSES = "APT_EXPECTED_PROCESSES"
SINGLE_PROCESS_TYPES = ("NO", "MULTI_CPU")  # accelerate starts one process for these, whatever num_processes says


def launch(profile: str, num_processes: int | None, words: Sequence[str]) -> int:
    """Run ``apt-trainer WORDS`` under accelerate and return its exit code.

    Args:
        profile: name of a shipped profile, or path of an accelerate config file.
        num_processes: overrides the profile's; where neither says, one per accelerator of this machine.

    Raises:
        UserError: for an unknown profile, or one that cannot start that many processes here.
    """
    path = profile_path(profile)
    config = read_profile(path)
    if config.get("distributed_type") == "DEEPSPEED":
        require(DEEPSPEED, f"accelerate_config: {profile}")
    processes = count_processes(path, config, num_processes)
    # Only the workers may print a traceback: --quiet drops that of the launcher.
    command = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", "--config_file", str(path)]
    command += ["--num_processes", str(processes), "--module", "apt_trainer", *words]
    return _wait(subprocess.Popen(command, env=launch_environment(config, processes), start_new_session=True))


def profile_path(profile: str) -> Path:
    """Find a profile by name or path.

    Raises:
        UserError: naming the profiles there are.
    """
    for path in (Path(profile), PROFILES / f"{profile}.yaml"):
        if path.is_file():
            return path
    names = ", ".join(sorted(p.stem for p in PROFILES.glob("*.yaml"))) or f"none in {PROFILES}"
    raise UserError(f"accelerate_config={profile!r} is neither a file nor a profile. Profiles: {names}.")


def count_processes(path: Path, config: Mapping[str, Any], asked: int | None) -> int:
    """How many processes to start, all machines together.

    Raises:
        UserError: where accelerate or this machine would not start that many.
    """
    on_cpu, kind = bool(config.get("use_cpu")), str(config.get("distributed_type", "NO"))
    processes = asked or config.get("num_processes")
    if kind in SINGLE_PROCESS_TYPES and (processes or 1) > 1:
        raise UserError(
            f"{path}: distributed_type {kind} starts one process, but {processes} are asked for. "
            "Use a profile with distributed_type MULTI_GPU: ddp, or ddp_cpu without accelerators."
        )
    if kind in SINGLE_PROCESS_TYPES or on_cpu or config.get("num_machines", 1) > 1:
        return int(processes or 1)

    import torch

    devices = torch.accelerator.device_count()
    if not devices or (processes or 1) > devices:
        asked_for = f"{processes} processes are" if processes else "one process per accelerator is"
        raise UserError(
            f"{path}: {asked_for} asked for, but this machine has {devices} accelerator(s). "
            "Lower --num_processes, or use single_gpu or ddp_cpu."
        )
    return int(processes or devices)


def launch_environment(config: Mapping[str, Any], processes: int) -> dict[str, str]:
    """This process's environment plus what the workers need to know."""
    environment = {**os.environ, EXPECTED_PROCESSES: str(processes)}
    if config.get("use_cpu"):
        # accelerate's launcher for several processes does not hand use_cpu on; the Trainer reads this variable
        environment["ACCELERATE_USE_CPU"] = "true"
        environment.setdefault("DS_ACCELERATOR", "cpu")
        environment.setdefault("OMP_NUM_THREADS", "1")
    return environment


def check_world_size(actual: int) -> None:
    """Fail where processes were started that do not train together, or fewer than asked for.

    Args:
        actual: number of processes in the process group, ``training_arguments.world_size``.

    Raises:
        UserError: if it is not what ``apt-trainer train --num_processes`` or the launcher announced.
    """
    expected = int(os.environ.get(EXPECTED_PROCESSES) or os.environ.get("WORLD_SIZE") or actual)
    if actual != expected:
        raise UserError(
            f"{expected} processes were asked for, but {actual} train together. Start them with "
            "apt-trainer train --accelerate_config ddp; on CPU with ddp_cpu, or set ACCELERATE_USE_CPU=true."
        )


def read_profile(path: Path) -> dict[str, Any]:
    """Content of an accelerate config file; :class:`UserError` if it is none."""
    import yaml

    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not a valid YAML file: {error}") from error
    if not isinstance(config, dict):
        raise UserError(f"{path}: not a config file of accelerate. Make one with: accelerate config")
    return config


def _wait(process: subprocess.Popen[bytes]) -> int:
    """Wait for the launcher, handing signals on to it and its workers, which have a session of their own.

    Told to end, torch's launcher ends with 1 whatever its workers ended with; that becomes what a shell expects.
    """
    told: list[int] = []

    def forward(number: int, _frame: object = None) -> None:
        told.append(number)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)

    previous = {number: signal.signal(number, forward) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        code = process.wait()
    except KeyboardInterrupt:
        forward(signal.SIGINT)
        process.wait()
        raise
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    if code == 1 and told:
        return 128 + told[0]
    return code if code >= 0 else 128 - code  # ended by a signal
