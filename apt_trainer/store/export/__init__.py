"""A finished model in the format of another runtime, checked where it will run. To add one: a file that has what
:class:`Target` says, and one line in :data:`TARGETS`."""

from __future__ import annotations

import importlib
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from transformers import AutoImageProcessor, AutoTokenizer, PreTrainedModel, TokenizersBackend
from transformers.tokenization_utils_base import TOKENIZER_CONFIG_FILE, VERY_LARGE_INTEGER

from apt_trainer.errors import RunError, UserError, unknown_choice
from apt_trainer.settings import ModelSettings
from apt_trainer.settings.packages import check_packages
from apt_trainer.store.events import read_json_object, write_json
from apt_trainer.store.export.check import takes_images
from apt_trainer.store.pretrained import find_source, load_saved

TARGETS = {
    "onnx": "apt_trainer.store.export.onnx",
    "openvino": "apt_trainer.store.export.openvino",
    "gguf": "apt_trainer.store.export.gguf",
    "adapter": "apt_trainer.store.export.adapter",
    "hf": "apt_trainer.store.export.hf",
    "per_layer_config": "apt_trainer.store.export.per_layer_config",
    "decilm": "apt_trainer.store.export.decilm",
}
_OF_WEIGHTS = (".bin", ".data", ".gguf", ".onnx", ".safetensors")
RECORD = "export.json"
"""What was written and how it was checked, beside the exported model."""


class Running(Protocol):
    """An exported model as its own run time runs it on the CPU."""

    has_cache: bool
    """Whether it generates token by token."""
    largest_batch: int | None
    """Sequences that it takes at a time; None: any number."""

    def seconds(self, batch: Mapping[str, Any], new_tokens: int) -> tuple[float, ...]:
        """Of one forward pass on ``input_ids`` and ``attention_mask`` [batch, length]; of a model with a cache those
        of the prompt and of each of ``new_tokens`` further tokens of every sequence."""


class Target(Protocol):
    """A module of this package."""

    QUANTIZATIONS: tuple[str, ...]
    IS_RUN: bool
    """Whether :meth:`load` gives a run time of its own, whose speed and metric can be measured."""

    def refuse(self, model: PreTrainedModel, tokenizer: Any, quantize: str | None, cut: bool = False) -> None:
        """Raise :class:`UserError` for a model that the format cannot hold, with the nearest thing that works.

        ``cut``: its layers are going to be of different sizes. The model may be on the meta device.
        """

    def file_of(self, folder: Path, quantize: str | None) -> Path:
        """The weights in an exported ``folder``."""

    def write(self, model: PreTrainedModel, tokenizer: Any, folder: Path, quantize: str | None) -> None:
        """Write everything but the tokenizer's own files to ``folder``."""

    def compare(self, model: PreTrainedModel, tokenizer: Any, folder: Path, quantize: str | None) -> dict[str, Any]:
        """Run what was written in a process without apt_trainer beside ``model`` in this one: numbers, and ``equal``.

        ``loaded_by`` names the consumer; None where none is installed, so that nothing was compared."""

    def load(self, folder: Path, quantize: str | None, length: int, threads: int) -> Running:
        """Run what is in ``folder`` in this process, for ``length`` tokens at most."""


def parse_format(name: str) -> tuple[str, str | None]:
    """(format, quantisation) of ``onnx_int8``, ``gguf_q8_0``, ``onnx`` …; raises :class:`UserError`."""
    form, _, quantize = (name, "", "") if name in TARGETS else name.partition("_")
    if form not in TARGETS:
        raise unknown_choice("export", name, [*TARGETS])
    check_quantization(form, quantize or None)
    return form, quantize or None


def check_quantization(form: str, quantize: str | None) -> None:
    """Raise :class:`UserError` for a quantisation that ``form`` does not have."""
    allowed = target_of(form).QUANTIZATIONS
    if quantize is not None and quantize not in allowed:
        raise unknown_choice("quantize", quantize, allowed)


def target_of(form: str) -> Target:
    """The module of a format; raises :class:`UserError` for an unknown one."""
    if form not in TARGETS:
        raise unknown_choice("format", form, [*TARGETS])
    return importlib.import_module(TARGETS[form])  # type: ignore[return-value]


def is_timed(record: Mapping[str, Any]) -> bool:
    """Whether speed can be measured of what ``record`` (that of :func:`export`) tells of."""
    return record["loaded_by"] is not None and target_of(record["format"]).IS_RUN


def export(
    model: PreTrainedModel | str | Path,
    form: str,
    output: str | Path,
    *,
    quantize: str | None = None,
    tokenizer: Any = None,
) -> dict[str, Any]:
    """Write ``model`` to the new folder ``output`` and check it in a process that cannot import apt_trainer.

    Args:
        model: a finished model, or where one is: a folder, a hub name or a GGUF file.
        form: one of :data:`TARGETS`.
        output: folder, which may not hold anything yet.
        quantize: weights of fewer bits; what there is differs by format.
        tokenizer: of a model that is given as an object; otherwise the one beside the model.

    Returns:
        What ``export.json`` in ``output`` says: ``format``, ``quantize``, ``file``, ``bytes`` and what was found.

    Raises:
        UserError: the format cannot hold the model, a package is missing, or ``output`` is not empty.
        RunError: what was written does not compute what ``model`` does; nothing is left of it.
    """
    target, output = target_of(form), Path(output)
    check_quantization(form, quantize)
    check_packages({"export": [f"{form}_{quantize}" if quantize else form]})
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output} exists and is not empty. Give a folder that is to be made.")
    if not isinstance(model, PreTrainedModel):
        model, tokenizer = load_for_export(str(model), tokenizer)
    target.refuse(model, tokenizer, quantize)
    output.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
    try:
        folder = staging / "export"
        target.write(model, tokenizer, folder, quantize)
        if tokenizer is not None:
            _save_tokenizer(tokenizer, model, folder)
        record: dict[str, Any] = {
            "format": form,
            "quantize": quantize,
            "file": str(target.file_of(folder, quantize).relative_to(folder)),
        }
        record |= {"bytes": sum(file.stat().st_size for file in folder.rglob("*") if file.suffix in _OF_WEIGHTS)}
        record |= target.compare(model, tokenizer, folder, quantize)
        if record["loaded_by"] is not None and not record["equal"]:
            raise RunError(
                f"What was written as {form} does not compute what the model does (largest difference "
                f"{record['largest_difference']:.2g}); nothing was kept. Please report this with the model's config."
            )
        write_json(folder / RECORD, record)
        if output.exists():
            output.rmdir()
        folder.rename(output)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return record


def _save_tokenizer(tokenizer: Any, model: PreTrainedModel, folder: Path) -> None:
    """Write ``tokenizer``, with the longest input of ``model`` where it tells none: consumers ask it for that.

    They may have an older transformers, which knows a tokenizer without a class of its own by another name.
    """
    tokenizer.save_pretrained(folder)
    longest, file = getattr(model.config, "max_position_embeddings", None), folder / TOKENIZER_CONFIG_FILE
    if not file.is_file():
        return
    values = read_json_object(file)
    if values.get("tokenizer_class") == TokenizersBackend.__name__:
        values["tokenizer_class"] = "PreTrainedTokenizerFast"
    if longest is not None and tokenizer.model_max_length >= VERY_LARGE_INTEGER:
        for name, module in model.named_modules():
            if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
                longest -= module.padding_idx + 1  # positions are counted from there
        values["model_max_length"] = longest
    write_json(file, values)


def load_for_export(path: str, tokenizer: Any = None) -> tuple[PreTrainedModel, Any]:
    """The finished model at ``path`` in float32, and the tokenizer or image processor beside it, None where there is
    none."""
    source = find_source(path)
    model = load_saved(ModelSettings(path, dtype="float32")).eval()
    if tokenizer is None:
        options = {} if source.gguf_file is None else {"gguf_file": source.gguf_file}
        try:
            auto = AutoImageProcessor if takes_images(model) else AutoTokenizer
            tokenizer = auto.from_pretrained(source.path, **options)
        except (OSError, ValueError, KeyError):  # transformers' answers to a folder that has none
            tokenizer = None
    return model, tokenizer
