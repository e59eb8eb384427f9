"""OpenVINO: what the ONNX export computes, in the intermediate representation, for Intel's CPUs, GPUs and NPUs.

With ``int8`` nncf stores weights in 8 bits; it needs no data for that, and takes embeddings too. onnxruntime's 8-bit
file is not converted: OpenVINO runs that slower and less exactly than its own.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from apt_trainer.errors import UserError
from apt_trainer.store.export import onnx
from apt_trainer.store.export.check import compare_logits
from apt_trainer.store.export.onnx_session import OpenVinoModel

IS_RUN = True
QUANTIZATIONS = ("int8",)
FILE = "openvino_model.xml"


def refuse(model: PreTrainedModel, tokenizer: Any, quantize: str | None, cut: bool = False) -> None:
    """Raise :class:`UserError` for what ONNX cannot hold, and for two stacks."""
    onnx.refuse(model, tokenizer, quantize, cut)
    if model.config.is_encoder_decoder:
        raise UserError(
            f"{type(model).__name__} has an encoder and a decoder, which are not exported to OpenVINO. Use --format "
            "onnx."
        )


def file_of(folder: Path, quantize: str | None) -> Path:
    """The graph in an exported ``folder``; its weights lie beside it, as ``.bin``."""
    return folder / FILE


def write(model: PreTrainedModel, tokenizer: Any, folder: Path, quantize: str | None) -> None:
    """Write ``model``, traced as for ONNX, and its stock config to ``folder``."""
    import openvino

    folder.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as place:
        traced = Path(place) / "model.onnx"
        onnx.trace(model, tokenizer, traced)
        converted = openvino.convert_model(traced)
        if quantize is not None:
            converted = _quantized(converted)
        openvino.save_model(converted, file_of(folder, quantize), compress_to_fp16=False)
    onnx.write_config(model, folder)


def compare(model: PreTrainedModel, tokenizer: Any, folder: Path, quantize: str | None) -> dict[str, Any]:
    """Logits of several shapes with padding and, of a decoder, greedy tokens with the cache; by OpenVINO."""
    return compare_logits(model, onnx.RUNNER, file_of(folder, quantize), quantize) | {"loaded_by": "OpenVINO"}


def load(folder: Path, quantize: str | None, length: int, threads: int) -> OpenVinoModel:
    """Run what is in ``folder`` by OpenVINO; any ``length`` will do."""
    return OpenVinoModel(file_of(folder, quantize), threads)


def _quantized(model: Any) -> Any:
    with onnx.quiet():
        import nncf

        return nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT8_ASYM)
