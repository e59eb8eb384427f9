"""What every export is checked with: batches, prompts, and a process of its own to run a file in."""

from __future__ import annotations

import inspect
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from apt_trainer.errors import RunError
from apt_trainer.measure.generation import start_tokens
from apt_trainer.measure.latency import example_inputs
from apt_trainer.models import family_of

NEW_TOKENS = 12
TOLERANCE = 1e-3
"""Of the largest logit: two runtimes add in different orders."""


def batches(model: PreTrainedModel, left: bool = False) -> list[dict[str, Tensor]]:
    """``input_ids`` and ``attention_mask`` [batch, length] of several shapes; one is padded (``left``: in front).
    Where there is a decoder of its own, ``decoder_input_ids`` too. For a model of images one batch and a larger one of
    ``pixel_values``."""
    if takes_images(model):
        return [example_inputs(model, rows, 1, "cpu") for rows in (1, 3)]
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
        if model.config.is_encoder_decoder:
            found[-1]["decoder_input_ids"] = ids[:, :3].clone()
    return found


def has_cache(model: PreTrainedModel) -> bool:
    """Whether ``model`` generates token by token."""
    two_stacks = model.config.is_encoder_decoder and model.can_generate()
    return two_stacks or family_of(model.config).head(model).next_token


def takes_images(model: PreTrainedModel) -> bool:
    """Whether ``pixel_values`` go into ``model``, not tokens."""
    return bool(model.main_input_name == "pixel_values")


def compare_logits(model: PreTrainedModel, runner: Path, what: Path, quantize: str | None) -> dict[str, Any]:
    """Logits of several shapes with padding and, of a decoder, greedy tokens with the cache: ``model`` in this process
    beside ``what`` in one of its own, where ``runner`` answers (``onnx_session.main`` says how)."""
    left = has_cache(model) and not model.config.is_encoder_decoder
    asked = {
        f"{i}.{name}": value for i, batch in enumerate(batches(model, left=left)) for name, value in batch.items()
    }
    if not takes_images(model):
        prompt = prompt_of(model)
        asked |= {"prompt": prompt, "new_tokens": torch.tensor([NEW_TOKENS])}
        if model.config.is_encoder_decoder:
            asked["start"] = start_tokens(model, {"input_ids": prompt})
    with tempfile.TemporaryDirectory() as place:
        request, answer = Path(place) / "request.safetensors", Path(place) / "answer.safetensors"
        save_file(asked, request)
        run_alone(runner, what, request, answer)
        found = load_file(answer)
    largest, scale, agreeing = 0.0, 0.0, []
    for i, batch in enumerate(batches(model, left=left)):
        expected = _expected(model, batch)
        for name in [name.partition(".")[2] for name in found if name.startswith(f"{i}.")]:
            mask = None if model.config.is_encoder_decoder else batch.get("attention_mask")
            of_tokens = mask is not None and expected[name].ndim == 3 and expected[name].shape[:2] == mask.shape
            real = mask.bool() if mask is not None and of_tokens else slice(None)
            ours, theirs = expected[name][real], found[f"{i}.{name}"][real]
            largest, scale = max(largest, float((ours - theirs).abs().max())), max(scale, float(ours.abs().max()))
            agreeing.append((ours.argmax(-1) == theirs.argmax(-1)).float().flatten())
    numbers: dict[str, Any] = {"largest_difference": largest, "largest_output": scale}
    numbers["same_prediction"] = float(torch.cat(agreeing).mean())
    equal = largest <= TOLERANCE * max(scale, 1.0)
    if "generated" in found:
        numbers["greedy_tokens_equal"] = found["generated"].tolist() == greedy(model, prompt_of(model))
        equal = equal and numbers["greedy_tokens_equal"]
    return numbers | {"equal": equal or quantize is not None}


@torch.no_grad()
def _expected(model: PreTrainedModel, batch: dict[str, Tensor]) -> Any:
    extra = {}
    if "position_ids" in inspect.signature(model.forward).parameters and has_cache(model):
        extra["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    return model(**batch, **extra, return_dict=True)


def prompt_of(model: PreTrainedModel) -> Tensor:
    """Token ids [1, 8]."""
    return batches(model)[1]["input_ids"][:, :8]


@torch.no_grad()
def greedy(model: PreTrainedModel, prompt: Tensor, new_tokens: int = NEW_TOKENS) -> list[int]:
    """The most likely tokens after ``prompt`` [1, length], as transformers generates them; of a model with two stacks
    without what its generation config asks for."""
    if model.config.is_encoder_decoder:
        found = start_tokens(model, {"input_ids": prompt})
        for _ in range(new_tokens):
            logits = model(input_ids=prompt, decoder_input_ids=found, use_cache=False).logits
            found = torch.cat([found, logits[:, -1:].argmax(-1)], 1)
        return found[0, 1:].tolist()
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
