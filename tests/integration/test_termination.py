"""SIGTERM in the middle of a run: a checkpoint at the next step, exit code 143, and the resumed run ends the same."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import tiny_model
from transformers import TrainerCallback

from apt_trainer import APTTrainer, UserError, cli
from apt_trainer.training.checkpoints.state import check_complete
from apt_trainer.training.termination import Terminated
from integration.factories import SHORT, losses_of, make_trainer, weights_of
from integration.test_processes import two_processes


class Kill(TrainerCallback):
    """Sends this process SIGTERM while step ``step`` computes, if ``rank`` is its own."""

    def __init__(self, step: int, rank: int = 0) -> None:
        self.step, self.rank = step, rank

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step + 1 == self.step and args.process_index == self.rank:
            os.kill(os.getpid(), signal.SIGTERM)


def _trainer(folder: Path, *callbacks: TrainerCallback, **changes: Any) -> APTTrainer:
    model = tiny_model("bert", dropout=0.1)
    return make_trainer(folder, model, options={"callbacks": list(callbacks)}, **{**SHORT, **changes})


@pytest.mark.parametrize("step", [3, 5, 8])
def test_a_run_that_is_terminated_goes_on_bit_equal(tmp_path: Path, step: int) -> None:
    """In warm-up, in a mask window and at an event."""
    handler = signal.getsignal(signal.SIGTERM)
    whole = _trainer(tmp_path / "whole")
    whole.train()
    with pytest.raises(SystemExit) as ended:
        _trainer(tmp_path / "run", Kill(step)).train()
    assert isinstance(ended.value, Terminated) and (ended.value.code, ended.value.step) == (143, step)
    assert signal.getsignal(signal.SIGTERM) == handler
    assert sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*")) == [f"checkpoint-{step}"]
    check_complete(tmp_path / "run" / f"checkpoint-{step}")
    resumed = _trainer(tmp_path / "run")
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / f"checkpoint-{step}"))
    expected, got = weights_of(whole.model), weights_of(resumed.model)
    assert [name for name in expected if not torch.equal(expected[name], got[name])] == []
    assert losses_of(resumed) == losses_of(whole)


def test_the_command_line_ends_with_143(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def train(recipe: Any) -> Any:
        raise Terminated(7)

    recipe = SimpleNamespace(training=SimpleNamespace(world_size=1))
    monkeypatch.setattr("apt_trainer.settings.recipe.load_recipe", lambda *words: recipe)
    monkeypatch.setattr("apt_trainer.runs.run.train", train)
    assert cli.main(["train"]) == 143
    message = "error: terminated after a checkpoint at step 7; go on with resume_from_checkpoint: true"
    assert capsys.readouterr().err.strip() == message


def test_the_way_of_transformers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="enable_jit_checkpoint"):
        _trainer(tmp_path, enable_jit_checkpoint=True)


WORKER = """
import json, os, sys
sys.path[:0] = [{root!r}, {tests!r}]
from pathlib import Path
import torch
torch.set_num_threads(1)
from integration.test_termination import Kill, _trainer
from apt_trainer.training.termination import Terminated

folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
try:
    _trainer(folder / "run", Kill(4, rank=1), ddp_backend="gloo").train()
except Terminated as ended:
    (folder / f"ended.{{rank}}.json").write_text(json.dumps([ended.code, ended.step]))
os._exit(0)
"""


@pytest.mark.distributed
def test_all_processes_stop_at_one_step(tmp_path: Path) -> None:
    """Only the second is told, during step 4: the exchange of the next step tells the first."""
    two_processes(tmp_path, WORKER, "ended.0.json", "ended.1.json")
    ended = [json.loads((tmp_path / f"ended.{rank}.json").read_text()) for rank in (0, 1)]
    assert ended == [[143, 5], [143, 5]]
    check_complete(tmp_path / "run/checkpoint-5")
