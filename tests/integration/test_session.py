"""The method in a loop of the user's own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_model
from torch.utils.data import DataLoader, Subset

from apt_trainer import APTTrainer, PruningSession, UserError, load_pruned
from apt_trainer.settings import MethodSettings
from integration.factories import Rows, config, events_of, losses_of, weights_of

ROOT = Path(__file__).resolve().parents[2]
METHOD: dict[str, Any] = {
    "target_sparsity": 0.4,
    "num_pruning_events": 2,
    "pruning_start": 1,
    "pruning_end": 6,
    "distillation_end": 9,
    "mask_window": 2,
    "observe_every": 1,
    "round_to": 1,
    "lora_r": 2,
    "lora_alpha": 4,
    "max_rank": 8,
    "min_hidden": 8,
    "distillation_weight": 1.0,
    "refit": False,
}
STEPS = 12


def batches(rows: range, size: int = 8) -> list[dict[str, torch.Tensor]]:
    return list(DataLoader(Subset(Rows(), rows), size))


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.0)


def run(train: list[Any], model: Any = None, **settings: Any) -> Any:
    given = {"heldout": batches(range(80, 96)), "make_optimizer": adam, "seed": 7}
    given |= {name: settings.pop(name) for name in ("heldout", "teacher", "calibration") if name in settings}
    model = tiny_model("bert") if model is None else model
    torch.manual_seed(7)
    session: Any = PruningSession(model, MethodSettings(**{**METHOD, **settings}), len(train), **given)
    session.losses = []
    for batch in train:
        loss = session.loss(batch)
        loss.backward()
        session.losses.append(float(loss))
        session.step()
    return session


@pytest.mark.parametrize("changes", [{}, {"tune_after_pruning": "full"}, {"prune_targets": ["heads", "hidden"]}])
def test_a_loop_trains_as_the_trainer_does(changes: dict[str, Any], tmp_path: Path) -> None:
    seen: list[dict[str, torch.Tensor]] = []

    class Recording(APTTrainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            if model.training:
                seen.append(dict(inputs))
            return super().compute_loss(model, inputs, *args, **kwargs)

    plain = {"max_grad_norm": 0.0, "lr_scheduler_type": "constant", "warmup_steps": 0, "weight_decay": 0.0, "seed": 7}
    plain |= {"max_steps": STEPS, "learning_rate": 1e-3, "per_device_train_batch_size": 8, "heldout_fraction": 0.1}
    args = config(tmp_path, **{**METHOD, **plain, **changes, "per_device_eval_batch_size": 8})
    heldout = Subset(Rows(), range(80, 96))
    model = tiny_model("bert")
    torch.manual_seed(7)  # adapters are drawn
    trainer = Recording(model, args, Subset(Rows(), range(80)), heldout_dataset=heldout)
    trainer.train()
    assert len(seen) == STEPS
    session = run(seen, **changes)
    assert session.pruner.plan == trainer.pruner.plan and session.pruner.sparsity() >= 0.4
    assert events_of(tmp_path, "teacher")
    expected = {step: values[0] for step, values in losses_of(trainer).items()}
    assert dict(enumerate(session.losses, 1)) == pytest.approx(expected, rel=1e-3)
    shapes = {name: value.shape for name, value in weights_of(trainer.model).items()}
    assert {name: value.shape for name, value in weights_of(session.finish()).items()} == shapes


def test_the_optimizer_and_its_schedule_go_on(tmp_path: Path) -> None:
    train = batches(range(80)) + batches(range(16))
    settings = MethodSettings(**{**METHOD, "tune_after_pruning": "full"})
    session = PruningSession(tiny_model("bert"), settings, STEPS, adam, heldout=batches(range(80, 96)))
    optimizer, schedule = session.optimizer, torch.optim.lr_scheduler.LinearLR(session.optimizer, 1.0, 0.0, STEPS)
    changes = []
    for step, batch in enumerate(train, 1):
        for _ in range(2):
            (session.loss(batch) / 2).backward()
        changes.append(session.step())
        schedule.step()
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        assert held == {id(p) for p in session.model.parameters() if p.requires_grad}
        ages = {int(state["step"]) for state in optimizer.state.values()}
        assert max(ages) == step or changes[-1] is not None  # "full" begins anew, and so do merged adapters
        assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-3 * (1 - step / STEPS), abs=1e-9)
    assert session.optimizer is optimizer and [c["kind"] for c in changes if c] == ["prune", "prune"]
    with pytest.raises(UserError, match="is for 12 steps, and these are done"):
        session.step()
    session.save(tmp_path / "pruned")
    batch = train[0]
    assert torch.equal(session.model(**batch).logits, load_pruned(tmp_path / "pruned")(**batch).logits)


def test_a_cut_before_the_first_step_and_another_model_as_teacher() -> None:
    before = {"pruning_time": "before", "pruning_start": None, "mask_window": 0}
    given = {"distillation": "model", "teacher_name_or_path": "x", "teacher": tiny_model("bert"), "heldout": ()}
    session = run(batches(range(80)), calibration=batches(range(16)), **before, **given)
    assert session.pruner.sparsity() >= 0.4 and session.done == 10


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"heldout": ()}, "Give heldout"),
        ({"teacher": object()}, "belong together"),
        ({"pruning_time": "before", "pruning_start": None, "distillation": "none"}, "Give calibration"),
        ({"importance": "nri", "prune_targets": ["sublayers"], "distillation": "none"}, "which a session has none of"),
    ],
)
def test_what_a_session_lacks_is_an_error_at_the_start(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        run(batches(range(80)), **settings)


def test_the_loop_of_the_documentation_runs(tmp_path: Path) -> None:
    text = (ROOT / "recipes" / "README.md").read_text(encoding="utf-8")
    section = text.split("## Without a Trainer")[1]
    snippet = section.split("```python\n")[1].split("```")[0]
    assert len([line for line in snippet.splitlines() if line.strip()]) < 30
    given = f"""
import sys
sys.path.insert(0, {str(ROOT / "tests")!r})
from integration.test_session import batches
from texts import word_tokenizer
from tiny import tiny_model

model, tokenizer, epochs = tiny_model("bert"), word_tokenizer(), 3
train, heldout = batches(range(64)), batches(range(80, 96))
dense = sum(p.numel() for p in model.parameters())
"""
    program = given + snippet + "\nassert sum(p.numel() for p in model.parameters()) < 0.8 * dense\n"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path, timeout=250)
    assert done.returncode == 0, done.stderr
    told = [line for line in done.stdout.splitlines() if line.startswith("step ")]
    assert len(told) >= 2 and told[-1].endswith("removed")
