"""Packages that some settings need beyond the dependencies: whether they are installed, before anything loads.

Only looks for them; they are imported where they are used. A setting that names something unknown is not refused here.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from apt_trainer.errors import UserError


class Package(NamedTuple):
    """``modules``: any of them will do; ``install``: what pip takes."""

    install: str
    modules: tuple[str, ...]

    @property
    def is_installed(self) -> bool:
        return any(_is_there(module) for module in self.modules)


def _of(module: str, install: str | None = None) -> Package:
    return Package(install or module, (module,))


TRL = _of("trl", "'apt-trainer[lm]'")
ROUGE, BLEU = _of("rouge_score", "'apt-trainer[lm]'"), _of("sacrebleu", "'apt-trainer[lm]'")
SENTENCE_TRANSFORMERS = _of("sentence_transformers", "'apt-trainer[embedding]'")
GGUF = _of("gguf", "'apt-trainer[lm]'")
HARNESS = _of("lm_eval", "'apt-trainer[lm_eval]'")
DEEPSPEED = _of("deepspeed", "'apt-trainer[deepspeed]'")
SHTAB = _of("shtab", "'apt-trainer[completion]'")
TOKENIZERS = tuple(_of(name, "sentencepiece tiktoken protobuf") for name in ("sentencepiece", "tiktoken"))
TORCHAO, BITSANDBYTES = _of("torchao", "'apt-trainer[quantize]'"), _of("bitsandbytes", "'apt-trainer[quantize]'")

_EXPORT = "'apt-trainer[export]'"
_EXPORTS = {
    "onnx": (_of("onnx", _EXPORT), _of("onnxscript", _EXPORT), _of("onnxruntime", _EXPORT)),
    "gguf": (_of("gguf", _EXPORT),),
}
_EXPORTS["openvino"] = (*_EXPORTS["onnx"][:2], _of("openvino", _EXPORT))
_EXPORTS["openvino_int8"] = (*_EXPORTS["openvino"], _of("nncf", _EXPORT))
_QUANTIZE = {"int8": TORCHAO, "int4": TORCHAO, "llm_int8": BITSANDBYTES, "nf4": BITSANDBYTES}
_METRICS = {name: ROUGE for name in ("rouge1", "rouge2", "rougeL", "rougeLsum")} | {"bleu": BLEU, "chrf": BLEU}
_DEFAULT_METRICS = {"summarization": "rougeL", "translation": "bleu"}
_TRACKERS = {
    "azure_ml": _of("azureml.core", "azureml-core"),
    "clearml": _of("clearml"),
    "codecarbon": _of("codecarbon"),
    "comet_ml": _of("comet_ml"),
    "dagshub": _of("dagshub"),
    "dvclive": _of("dvclive"),
    "flyte": _of("flytekit"),
    "mlflow": _of("mlflow"),
    "neptune": _of("neptune"),
    "swanlab": _of("swanlab"),
    "tensorboard": Package("tensorboard", ("tensorboard", "tensorboardX")),
    "trackio": _of("trackio"),
    "wandb": _of("wandb"),
}
_OPTIMIZERS = {
    "adamw_torch_4bit": TORCHAO,
    "adamw_torch_8bit": TORCHAO,
    "adamw_anyprecision": _of("torchdistx"),
    "adamw_torch_xla": _of("torch_xla"),
    "adamw_torch_npu_fused": _of("torch_npu"),
    "adamw_apex_fused": _of("apex", "git+https://github.com/NVIDIA/apex"),
    "grokadamw": _of("grokadamw"),
    "stable_adamw": _of("optimi", "torch-optimi"),
}
_OPTIMIZER_PARTS = {
    "bnb": BITSANDBYTES,
    "8bit": BITSANDBYTES,
    "32bit": BITSANDBYTES,
    "ademamix": BITSANDBYTES,
}
_KERNELS = _of("kernels")
_ATTENTIONS = {
    "flash_attention_2": Package("flash-attn --no-build-isolation", ("flash_attn", "kernels")),
    "flash_attention_3": Package("kernels", ("flash_attn_interface", "kernels")),
    "flash_attention_4": Package("kernels", ("flash_attn.cute", "kernels")),
}


def require(package: Package, purpose: str) -> None:
    """Raise :class:`UserError` where ``package`` is not installed; ``purpose``: the setting that needs it."""
    if not package.is_installed:
        name = package.modules[0].partition(".")[0]
        raise UserError(
            f"{purpose} needs the package {name}, which is not installed. Install it: pip install {package.install}"
        )


def check_packages(settings: Mapping[str, Any]) -> None:
    """Raise :class:`UserError` for the first of ``settings`` (name → value) whose package is not installed."""
    for purpose, package in _needed(settings):
        require(package, purpose)


def _needed(settings: Mapping[str, Any]) -> Iterator[tuple[str, Package]]:
    """What ``settings`` name, as (setting and value, package)."""
    trackers = settings.get("report_to") or []
    for name in [trackers] if isinstance(trackers, str) else trackers:
        if name in _TRACKERS:
            yield f"report_to: {name}", _TRACKERS[name]
        if name == "dagshub":
            yield f"report_to: {name}", _TRACKERS["mlflow"]
    optimizer = str(getattr(settings.get("optim"), "value", settings.get("optim") or ""))
    for package in _of_optimizer(optimizer):
        yield f"optim: {optimizer}", package
    if settings.get("deepspeed"):
        yield "deepspeed", DEEPSPEED
    if settings.get("lm_eval_tasks"):
        yield f"lm_eval_tasks: {settings['lm_eval_tasks']}", HARNESS
    if settings.get("quantize") in _QUANTIZE:
        yield f"quantize: {settings['quantize']}", _QUANTIZE[settings["quantize"]]
    if settings.get("base_quantization"):
        yield f"base_quantization: {settings['base_quantization']}", BITSANDBYTES
    yield from _of_exports(settings.get("export") or [])
    attention = str(settings.get("attn_implementation") or "").removeprefix("paged|")
    if attention in _ATTENTIONS or "/" in attention:
        yield f"attn_implementation: {attention}", _ATTENTIONS.get(attention, _KERNELS)
    for name in ("gguf_file", "model_name_or_path", "tokenizer_name_or_path", "teacher_name_or_path"):
        path = str(settings.get(name) or "")
        if path.endswith(".gguf") and not Path(path).is_dir():
            yield f"{name}: {path}", GGUF
    yield from _of_task(settings)


def _of_optimizer(name: str) -> list[Package]:
    if name in _OPTIMIZERS:
        return [_OPTIMIZERS[name]]
    return list(dict.fromkeys(package for part, package in _OPTIMIZER_PARTS.items() if part in name))


def _of_exports(names: Iterable[str]) -> Iterator[tuple[str, Package]]:
    for name in names:
        yield from (
            (f"export: {name}", package) for package in _EXPORTS.get(name) or _EXPORTS.get(name.partition("_")[0], ())
        )


def _of_task(settings: Mapping[str, Any]) -> Iterator[tuple[str, Package]]:
    task = settings.get("task")
    if task in ("language_modeling", "instruction_tuning"):
        yield f"task: {task}", TRL
    if task == "embedding":
        yield f"task: {task}", SENTENCE_TRANSFORMERS
    metric = settings.get("metric") or _DEFAULT_METRICS.get(str(task))
    if task in _DEFAULT_METRICS and metric in _METRICS:
        yield f"metric: {metric} (task: {task})", _METRICS[metric]


def _is_there(module: str) -> bool:
    try:
        spec = importlib.util.find_spec(module)
    except (ModuleNotFoundError, ValueError):  # its parent is not there; a module that has no spec
        return False
    return spec is not None and spec.origin is not None  # else a folder of that name, as wandb leaves where it ran
