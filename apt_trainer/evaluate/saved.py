"""A saved language model, pruned or not, on a text and on tasks: what ``apt-trainer evaluate`` does with them.

Not for the task of a recipe: that is :func:`apt_trainer.runs.run.evaluate`.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apt_trainer.errors import UserError
from apt_trainer.evaluate.harness import TaskOptions
from apt_trainer.evaluate.perplexity import perplexity
from apt_trainer.evaluate.quantization import quantize
from apt_trainer.measure import count_parameters
from apt_trainer.settings import ModelSettings, resolve_path
from apt_trainer.settings.packages import check_packages
from apt_trainer.store.pretrained import choose_device, load_saved, load_tokenizer, read_config, refuse_images


@dataclass(frozen=True)
class LanguageRequest(TaskOptions):
    """What to evaluate on: a text file, tasks of lm_eval, or both.

    ``text`` to ``start_token`` are those of :func:`~apt_trainer.evaluate.perplexity.perplexity`. ``device``: default
    is the accelerator if there is one. ``quantize``: a form of :mod:`apt_trainer.evaluate.quantization`.
    """

    text: str | None = None
    window: int = 1024
    stride: int | None = None
    max_tokens: int | None = None
    start_token: bool | None = None
    device: str | None = None
    quantize: str | None = None
    seed: int = 0


def evaluate_language(settings: ModelSettings, request: LanguageRequest) -> dict[str, Any]:
    """Load a model and evaluate it.

    Returns:
        ``model``, ``parameters``, ``dtype``, ``device``, ``seconds``; ``quantised``, ``perplexity`` and
        ``lm_eval`` as far as asked for, with 95 % confidence intervals.

    Raises:
        UserError: anything that cannot work; a missing text file before the weights load.
    """
    check_packages({**vars(settings), "quantize": request.quantize, "lm_eval_tasks": request.tasks})
    text = None if request.text is None else _read(request.text)
    device = choose_device(request.device)
    refuse_images(read_config(settings), "Perplexity or a task of lm_eval")
    tokenizer = load_tokenizer(settings)
    model = load_saved(settings).to(device)
    started = time.perf_counter()
    found: dict[str, Any] = {
        "model": settings.model_name_or_path,
        "parameters": count_parameters(model),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(device),
    }
    if request.quantize is not None:
        found["quantised"] = quantize(model, request.quantize)._asdict()
    if text is not None:
        result = perplexity(
            model,
            tokenizer,
            text,
            request.window,
            request.stride,
            request.max_tokens,
            request.batch_size,
            request.start_token,
        )
        interval = result.interval(request.seed)
        found["perplexity"] = {
            "value": result.value,
            **({} if interval is None else interval._asdict()),
            "text": request.text,
            "predicted_tokens": result.predicted_tokens,
            "windows": len(result.nll),
            "window": result.window,
            "stride": result.stride,
            "start_token": tokenizer.decode(result.start) if result.start else None,
        }
    if request.tasks:
        found["lm_eval"] = request.run_tasks(model, tokenizer, request.seed)
    return found | {"seconds": time.perf_counter() - started}


def _read(path: str) -> str:
    try:
        return Path(resolve_path(path)).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as text: {error}. Give a plain text file in UTF-8.") from error
