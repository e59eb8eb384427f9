"""What every export is checked with: batches, prompts, and a process of its own to run a file in."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from apt_trainer.errors import RunError

NEW_TOKENS = 12
TOLERANCE = 1e-3
"""Of the largest logit: two runtimes add in different orders."""


def batches(model: PreTrainedModel, left: bool = False) -> list[dict[str, Tensor]]:
    """``input_ids`` and ``attention_mask`` [batch, length] of several shapes; one is padded (``left``: in front)."""
    longest = getattr(model.config, "max_position_embeddings", None) or 64
    generator, found = torch.Generator().manual_seed(0), []
    for rows, length in ((1, 3), (1, 33), (3, 17)):
        length = min(length, longest - 4)
        ids = torch.randint(1, model.config.vocab_size, (rows, length), generator=generator)
        pad, end = (getattr(model.config, f"{name}_token_id", None) for name in ("pad", "eos"))
        for special in (pad, end):
            if isinstance(special, int):
                ids[ids == special] = (special + 1) % model.config.vocab_size
        mask = torch.ones_like(ids)
        for row in range(1, rows):
            gone = slice(0, 4 * row) if left else slice(length - 4 * row, length)
            mask[row, gone] = 0
            ids[row, gone] = pad if isinstance(pad, int) else 0
        found.append({"input_ids": ids, "attention_mask": mask})
    return found


def prompt_of(model: PreTrainedModel) -> Tensor:
    """Token ids [1, 8]."""
    return batches(model)[1]["input_ids"][:, :8]


@torch.no_grad()
def greedy(model: PreTrainedModel, prompt: Tensor, new_tokens: int = NEW_TOKENS) -> list[int]:
    """The most likely tokens after ``prompt`` [1, length], as transformers generates them."""
    answer = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=new_tokens, do_sample=False, eos_token_id=None
    )
    return answer[0, prompt.shape[1] :].tolist()  # type: ignore[no-any-return, index]


def run_alone(script: Path, *arguments: Path) -> None:
    """Run ``script`` in a process that sees no apt_trainer; raises :class:`RunError` with its last line."""
    command = [sys.executable, "-I", str(script), *(str(argument) for argument in arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        lines: list[Any] = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise RunError(f"{arguments[0].name} does not run: {lines[-1]}")
