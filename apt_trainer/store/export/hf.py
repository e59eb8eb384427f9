"""The folder that a save writes, which stock transformers loads with the code that it carries."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from apt_trainer.errors import UserError
from apt_trainer.models.modeling_apt import carries_code
from apt_trainer.store.export.check import compare_logits

IS_RUN = False
QUANTIZATIONS: tuple[str, ...] = ()
RUNNER = Path(__file__).with_name("hf_session.py")


def refuse(model: PreTrainedModel, tokenizer: Any, quantize: str | None, cut: bool = False) -> None:
    """Raise :class:`UserError` for a model that runs by an execution plan, which needs apt_trainer."""
    if getattr(model.config, "apt_plan", None) is not None:
        raise UserError("A model with an execution plan is not exported. Drop layers instead: apt-trainer drop.")


def file_of(folder: Path, quantize: str | None) -> Path:
    """The weights in ``folder``, or the list of their files."""
    whole = folder / SAFE_WEIGHTS_NAME
    return whole if whole.is_file() else folder / SAFE_WEIGHTS_INDEX_NAME


def write(model: PreTrainedModel, tokenizer: Any, folder: Path, quantize: str | None) -> None:
    model.save_pretrained(folder)


def compare(model: PreTrainedModel, tokenizer: Any, folder: Path, quantize: str | None) -> dict[str, Any]:
    """Logits of several shapes with padding and, of a decoder, greedy tokens with the cache; by transformers. Of a
    folder without code nothing is compared, since apt_trainer alone loads it."""
    if hasattr(model.config, "apt_structure") and not carries_code(model.config):
        return {"loaded_by": None}
    return compare_logits(model, RUNNER, folder, quantize) | {"loaded_by": "transformers"}
