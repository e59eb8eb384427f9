"""ONNX: encoders as a function of their inputs, decoders with a key-value cache whose layers may differ in width.

The folder is laid out as transformers.js, optimum, sentence-transformers and FastEmbed read it: ``onnx/model.onnx``
(one file), ``onnx/model_quantized.onnx`` with 8-bit weights, a stock ``config.json`` and the tokenizer; of a decoder
also what onnxruntime-genai reads; of an encoder and a decoder ``encoder_model`` and ``decoder_model_merged`` instead
(``onnx_two_stacks``). It holds no other weights, so that no loader takes the config for that of a dense model.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import io
import logging
import shutil
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.utils import CONFIG_NAME

from apt_trainer.errors import UserError
from apt_trainer.models import family_of
from apt_trainer.models.modeling_apt import NoOp
from apt_trainer.models.slots import set_slot, slot_holders
from apt_trainer.store.events import write_json
from apt_trainer.store.export import onnx_two_stacks
from apt_trainer.store.export.check import batches, compare_logits, has_cache, takes_images
from apt_trainer.store.export.onnx_session import DECODER, ENCODER, PAST, PRESENT, OnnxModel, runner_of
from apt_trainer.store.saved_model import dense_shape

OPSET = 18
GENAI, MODULES = "genai_config.json", "modules.json"
FOLDER, MODEL, QUANTIZED = "onnx", "model", "_quantized"
_FREE = torch.export.Dim.DYNAMIC
IS_RUN = True
QUANTIZATIONS = ("int8",)
RUNNER = Path(__file__).with_name("onnx_session.py")


def refuse(model: PreTrainedModel, tokenizer: Any, quantize: str | None, cut: bool = False) -> None:
    """Raise :class:`UserError` for a model that would not compute the same; sizes may differ as they like."""
    if model.config.is_encoder_decoder and not has_cache(model):
        raise UserError(
            f"{type(model).__name__} has an encoder and a decoder but does not generate, and is not exported to ONNX. "
            "Serve the saved folder itself with transformers."
        )
    if family_of(model.config).has_experts:
        raise UserError(
            f"{type(model).__name__} is a mixture of experts, whose tokens part ways while it runs, and is not "
            "exported to ONNX. Serve the saved folder itself with transformers."
        )
    if getattr(model.config, "apt_plan", None) is not None:
        raise UserError("A model with an execution plan is not exported. Drop layers instead: apt-trainer drop.")


def file_of(folder: Path, quantize: str | None) -> Path:
    """The model in an exported ``folder``, of one with two stacks its decoder."""
    ending = f"{'' if quantize is None else QUANTIZED}.onnx"
    whole = folder / FOLDER / f"{MODEL}{ending}"
    return whole if whole.is_file() else whole.with_name(f"{DECODER}{ending}")


def write(model: PreTrainedModel, tokenizer: Any, folder: Path, quantize: str | None) -> None:
    """Write ``model`` to ``folder``; with ``quantize`` its 8-bit form instead of the plain one."""
    target = folder / FOLDER
    target.mkdir(parents=True)
    for part in (ENCODER, DECODER) if model.config.is_encoder_decoder else (MODEL,):
        plain = target / f"{part}.onnx"
        trace(model, tokenizer, plain)
        if quantize is not None:
            _quantize(plain, target / f"{part}{QUANTIZED}.onnx")
            plain.unlink()
    write_config(model, folder)
    if model.config.is_encoder_decoder:
        if model.generation_config is not None:
            model.generation_config.save_pretrained(folder)
    elif has_cache(model):
        write_json(folder / GENAI, _genai_config(model, file_of(folder, quantize)))
    _copy_pooling(Path(str(model.config._name_or_path)), folder)


def _copy_pooling(source: Path, folder: Path) -> None:
    """What sentence-transformers reads beside a model, where the saved folder has it: modules, pooling, prompts."""
    listed = source / MODULES
    if not listed.is_file():
        return
    shutil.copy(listed, folder)
    for file in source.glob("*sentence*.json"):
        shutil.copy(file, folder)
    for config in source.glob(f"*_*/{CONFIG_NAME}"):
        (folder / config.parent.name).mkdir()
        shutil.copy(config, folder / config.parent.name)


def _genai_config(model: PreTrainedModel, file: Path) -> dict[str, Any]:
    """What onnxruntime-genai reads of a decoder; each attention that is left has its slot of the cache."""
    config = model.config
    example, _ = _decoder(copy.deepcopy(model).float().eval())
    keys = [value for name, value in example.items() if name.endswith(".key")]
    special = {name: getattr(config, name, None) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    end = special["eos_token_id"]
    decoder = {
        "filename": f"{file.parent.name}/{file.name}",
        "session_options": {"provider_options": []},
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": keys[0].shape[1],
        "head_size": keys[0].shape[3],
        "num_hidden_layers": len(keys),
        "inputs": {
            **{name: name for name in ("input_ids", "attention_mask", "position_ids")},
            "past_key_names": f"{PAST}%d.key",
            "past_value_names": f"{PAST}%d.value",
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": f"{PRESENT}%d.key",
            "present_value_names": f"{PRESENT}%d.value",
        },
    }
    length = getattr(config, "max_position_embeddings", None) or 2048
    described = {
        "type": "llama",
        "context_length": length,
        "vocab_size": config.vocab_size,
        **{name: value if value is not None else end if end is not None else 0 for name, value in special.items()},
        "decoder": decoder,
    }
    return {
        "model": described,
        "search": {"do_sample": False, "max_length": length, "past_present_share_buffer": False},
    }


def write_config(model: PreTrainedModel, folder: Path) -> None:
    """Write the stock config, for consumers that look up labels and special tokens there."""
    _, config = dense_shape(model.config)
    config.architectures = [_stock_name(model)]
    config.save_pretrained(folder)


def compare(model: PreTrainedModel, tokenizer: Any, folder: Path, quantize: str | None) -> dict[str, Any]:
    """Logits of several shapes with padding and, of a decoder, greedy tokens with the cache; by onnxruntime."""
    return compare_logits(model, RUNNER, file_of(folder, quantize), quantize) | {"loaded_by": "onnxruntime"}


def load(folder: Path, quantize: str | None, length: int, threads: int) -> OnnxModel:
    """Run what is in ``folder`` by onnxruntime; any ``length`` will do."""
    file = file_of(folder, quantize)
    return runner_of(file)(file, threads)


def input_names(model: PreTrainedModel, tokenizer: Any) -> list[str]:
    """What an encoder is given: what its tokenizer makes, or without one what its config describes."""
    if takes_images(model):
        return [model.main_input_name]
    taken = inspect.signature(model.forward).parameters
    made = getattr(tokenizer, "model_input_names", None)
    if made is None:
        made = ["input_ids", "attention_mask"]
        if getattr(model.config, "type_vocab_size", 0) > 1:
            made.append("token_type_ids")
    return [name for name in made if name in taken]


def trace(model: PreTrainedModel, tokenizer: Any, file: Path) -> None:
    """Write ``model`` as ONNX to ``file``; of one with two stacks the one that the file is named after."""
    model = copy.deepcopy(model).float().eval().to("cpu")
    model.set_attn_implementation("eager")
    if file.stem == ENCODER:
        example, wrapper = _encoder(model.get_encoder(), ["input_ids", "attention_mask"])
    elif file.stem == DECODER:
        example, wrapper = onnx_two_stacks.decoder(model)
    elif has_cache(model):
        example, wrapper = _decoder(model)
    else:
        example, wrapper = _encoder(model, input_names(model, tokenizer))
    dynamic = [{0: _FREE} if takes_images(model) else _dynamic(value) for value in example.values()]
    past = [name for name in example if name.startswith(PAST)]
    plain = [value for name, value in example.items() if name not in past]
    arguments = (*plain, [example[name] for name in past]) if past else (*plain,)
    shapes = (*dynamic[: len(plain)], dynamic[len(plain) :]) if past else (*dynamic,)
    with torch.no_grad(), quiet():
        outputs = list(wrapper(*arguments))
        program = torch.onnx.export(
            wrapper,
            arguments,
            dynamo=True,
            dynamic_shapes={"inputs": shapes},
            input_names=list(example),
            output_names=[*wrapper.outputs, *(name.replace(PAST, PRESENT) for name in past)],
            opset_version=OPSET,
            verbose=False,
        )
        assert program is not None and len(outputs) == len(wrapper.outputs) + len(past)
        program.save(str(file), external_data=_bytes(model) > 1.9e9)
    if file.stem == DECODER:
        onnx_two_stacks.open_to_consumers(file)


class _Encoder(nn.Module):
    """[batch, length] inputs in the order of ``names`` → the outputs of the task head."""

    def __init__(self, model: nn.Module, names: Sequence[str], outputs: Sequence[str]) -> None:
        super().__init__()
        self.model, self.names, self.outputs = model, names, outputs

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        found = self.model(**dict(zip(self.names, inputs, strict=True)), return_dict=True)
        return tuple(found[name] for name in self.outputs)


class _Decoder(nn.Module):
    """(input_ids and position_ids [batch, new], attention_mask [batch, past + new], past) → (logits, present).

    ``past``: key and value of each attention that is left, [batch, heads of that layer, past, head size].
    """

    outputs = ("logits",)

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        config = model.config
        self.window = getattr(config, "sliding_window", None)
        if getattr(config, "use_sliding_window", True) is False:
            self.window = None
        self.kinds = sorted(set(getattr(config, "layer_types", None) or ()))

    def forward(self, *inputs: Any) -> tuple[Tensor, ...]:
        input_ids, attention_mask, position_ids, past = inputs
        cache = DynamicCache([(past[2 * i], past[2 * i + 1]) for i in range(len(past) // 2)])
        new, total = input_ids.shape[1], attention_mask.shape[1]
        query = torch.arange(total - new, total, device=input_ids.device)[:, None]
        key = torch.arange(total, device=input_ids.device)[None]
        real = attention_mask[:, None, None, :] > 0
        masks = {"full_attention": (key <= query)[None, None] & real}
        if self.window is not None:
            masks["sliding_attention"] = masks["full_attention"] & (query - key < self.window)[None, None]
        least = torch.finfo(torch.float32).min
        added = {kind: torch.where(mask, 0.0, least) for kind, mask in masks.items()}
        mask: Any = {kind: added[kind] for kind in self.kinds} if len(self.kinds) > 1 else None
        if mask is None:
            only = self.kinds[0] if self.kinds else "sliding_attention"
            mask = added.get(only, added["full_attention"])
        found = self.model(
            input_ids=input_ids,
            attention_mask=mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
            return_dict=True,
        )
        return (found.logits, *(part for layer in cache.layers for part in (layer.keys, layer.values)))


def _encoder(model: Any, names: Sequence[str]) -> tuple[dict[str, Tensor], _Encoder]:
    if takes_images(model):
        values = batches(model)[-1]
    else:
        ids = torch.arange(10).reshape(2, 5) % max(2, model.config.vocab_size - 1) + 1
        values = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
    example = {name: values[name] for name in names}
    with torch.no_grad():
        found = model(**example, return_dict=True)
    known = ("logits", "start_logits", "end_logits", "last_hidden_state")
    return example, _Encoder(model, names, [name for name in known if name in found])


def _decoder(model: PreTrainedModel) -> tuple[dict[str, Tensor], _Decoder]:
    """Number the cache slots over the attentions that are left; their sizes are read from a forward pass."""
    slot = 0
    for path in family_of(model.config).layer_paths(model):
        layer = model.get_submodule(path)
        holders = slot_holders(layer)
        gone = tuple(name for name in holders if isinstance(layer.get_submodule(name), NoOp))
        for name in gone:
            layer.get_submodule(name).layer_idx = None  # type: ignore[assignment]
        left = tuple(name for name in holders if name not in gone)
        if any(left):  # some layers keep the number beside their attention
            set_slot(layer, left, slot)
            slot += 1
    if slot == 0:
        raise UserError("The model has no attention left, so that it has no cache to export. Keep one at least.")
    cache = DynamicCache()
    ids = torch.arange(6).reshape(2, 3) % max(2, model.config.vocab_size - 1) + 1
    with torch.no_grad():
        model(input_ids=ids, attention_mask=torch.ones_like(ids), past_key_values=cache, use_cache=True)
    example = {
        "input_ids": ids,
        "attention_mask": torch.ones(2, 3 + 4, dtype=torch.long),
        "position_ids": torch.arange(4, 7).repeat(2, 1),
    }
    for i, layer in enumerate(cache.layers):
        for part, value in (("key", layer.keys), ("value", layer.values)):
            example[f"{PAST}{i}.{part}"] = value.new_zeros(2, value.shape[1], 4, value.shape[3])
    return example, _Decoder(model)


def _dynamic(value: Tensor) -> dict[int, Any]:
    """Batch and length of an input may change: [batch, length], or [batch, heads, length, size] of a cache."""
    return {0: _FREE, (2 if value.ndim == 4 else 1): _FREE}


def _quantize(source: Path, target: Path) -> None:
    """8-bit weights per channel, 8-bit activations whose range is found while it runs."""
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.shape_inference import quant_pre_process

    prepared = target.with_suffix(".prepared")
    with quiet():
        quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
        quantize_dynamic(str(prepared), str(target), weight_type=QuantType.QInt8, per_channel=True)
    prepared.unlink()


def _stock_name(model: PreTrainedModel) -> str:
    architecture = getattr(model.config, "apt_base_architecture", None)
    return str(architecture or type(model).__name__)


def _bytes(model: nn.Module) -> int:
    return sum(parameter.numel() * 4 for parameter in model.parameters())


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """The exporter tells its progress and its own deprecations, which say nothing about the result."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
