"""bf16 lasts for the whole run: neither a checkpoint nor a change of shape takes it off the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tiny import tiny_model
from transformers import TrainerCallback

from apt_trainer import APTTrainer
from integration.factories import SHORT, SaveAt, losses_of, make_trainer


class Types(TrainerCallback):
    """Type of what the first query projection gives, by step, taken from the training passes."""

    def __init__(self) -> None:
        self.seen: dict[int, torch.dtype] = {}
        self.trainer: APTTrainer | None = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self.trainer is not None
        layer = self.trainer.model.get_submodule("bert.encoder.layer.0.attention.self.query")

        def look(module: Any, inputs: Any, output: torch.Tensor) -> None:
            if module.training:
                self.seen.setdefault(state.global_step + 1, output.dtype)

        self.handle = layer.register_forward_hook(look)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.handle.remove()


def test_every_step_computes_in_bf16(tmp_path: Path) -> None:
    runs = {}
    for bf16, expected in ((True, torch.bfloat16), (False, torch.float32)):
        types = Types()
        options = {"callbacks": [SaveAt((1, 5)), types]}
        trainer = make_trainer(tmp_path / str(bf16), tiny_model("bert"), None, options, **SHORT, bf16=bf16)
        types.trainer = trainer
        trainer.train()
        assert types.seen == dict.fromkeys(range(1, 13), expected)
        assert "forward" not in trainer.model.__dict__
        runs[bf16] = losses_of(trainer)
    assert all(runs[True][step][0] != runs[False][step][0] for step in runs[True])
