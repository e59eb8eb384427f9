"""bf16 lasts for the whole run: neither a checkpoint nor a change of shape takes it off the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tiny import tiny_model
from torch import nn
from transformers import TrainerCallback

from apt_trainer import APTTrainer
from integration.factories import SHORT, Rows, SaveAt, losses_of, make_trainer, weights_of


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


class ClassesOfNorms(TrainerCallback):
    def __init__(self) -> None:
        self.seen: set[str] = set()

    def on_step_end(self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **kwargs: Any) -> None:
        assert model is not None
        self.seen |= {type(module).__name__ for module in model.modules() if type(module).__name__.endswith("Norm")}


def test_norms_that_are_computed_anew_change_no_number(tmp_path: Path) -> None:
    """With masks, cuts, growing ranks and a teacher, which is a copy of the student."""
    runs = {}
    for on in (True, False):
        classes = ClassesOfNorms()
        model = tiny_model("llama", "ForCausalLM").to(torch.bfloat16)
        options = {"callbacks": [classes]}
        trainer = make_trainer(tmp_path / str(on), model, Rows(task="text"), options, **SHORT, recompute_norms=on)
        trainer.train()
        assert classes.seen == {"RecomputingLlamaRMSNorm" if on else "LlamaRMSNorm"}
        assert not any("Recomputing" in type(module).__name__ for module in trainer.model.modules())
        runs[on] = losses_of(trainer), weights_of(trainer.model)
    assert runs[True][0] == runs[False][0]
    assert runs[True][1].keys() == runs[False][1].keys()
    assert all(torch.equal(value, runs[False][1][name]) for name, value in runs[True][1].items())
