"""GGUF, for llama.cpp, Ollama and what is built on them: layers may differ in heads and neurons, or lack one of both.

llama.cpp reads sizes per layer in few architectures only: ``deci`` has the layer of LLaMA, ``openelm`` that of Qwen 3
with tied embeddings. A model whose layers are alike gets its own architecture. What would load but compute something
else is written otherwise (facts: llama.cpp b11739): deci leaves out the attention of a layer without a feed-forward,
so that one gets a feed-forward of zeros; sizes of heads are read from layer 0, so that it gets a head of zeros.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from apt_trainer.errors import UserError
from apt_trainer.models import family_of
from apt_trainer.models.modeling_apt import NoOp
from apt_trainer.store.export.check import NEW_TOKENS, TOLERANCE, greedy, prompt_of, run_alone
from apt_trainer.store.export.gguf_session import GgufModel
from apt_trainer.store.export.gguf_tokenizer import Nowhere, add_tokenizer

IS_RUN = True
QUANTIZATIONS = ("f16", "q8_0", "q4_0", "q5_0", "q4_k_m", "q5_k_m", "q6_k")
_BY_TOOL = {"q4_k_m": "Q4_K_M", "q5_k_m": "Q5_K_M", "q6_k": "Q6_K"}
BLOCK = 32
"""Weights that share a scale. Neurons are filled up with zeros to a multiple, else rows could not be quantised."""
PER_LAYER = ("deci", "openelm")
SQUARE = ("qwen2",)
"""Architectures whose query heads together are as wide as the residual stream."""
RUNNER = Path(__file__).with_name("gguf_session.py")
LIKELY = 20
TEXTS = ["Hello  world, 1234!\n\n\tcafé 日本", " def f(x):\n    return x"]
_Array = np.ndarray[Any, Any]


def refuse(model: PreTrainedModel, tokenizer: Any, quantize: str | None, cut: bool = False) -> None:
    """Raise :class:`UserError` for a model that no architecture of llama.cpp computes, for a tokenizer without a form
    in GGUF, and where nothing here makes the quantisation asked for."""
    architecture_of(model, cut)
    add_tokenizer(Nowhere(), tokenizer, model.config)
    if quantize in _BY_TOOL:
        _quantiser()


def architecture_of(model: PreTrainedModel, cut: bool = False) -> str:
    """Name of the architecture in which ``model`` is written; ``cut``: its layers are going to differ."""
    config, family = model.config, family_of(model.config)
    name = str(getattr(config, "apt_base_model_type", None) or config.model_type)
    known = family.gguf.get(name)
    reason = None
    if known is None:
        reason = "has no layer in llama.cpp whose size may differ"
    elif not family.head(model).next_token:
        reason = "is no language model"
    elif _has_window(config):
        reason = "attends to a window, which these architectures do not have"
    elif config.hidden_act not in ("silu", "swish"):
        reason = f"has hidden_act={config.hidden_act!r}; they have silu"
    elif getattr(config, "mlp_bias", False):
        reason = "has biases in its feed-forwards"
    elif _rope_type(config) not in ("default", "linear", "llama3"):
        reason = f"has positions of the kind {_rope_type(config)!r}"
    elif getattr(config, "apt_plan", None) is not None:
        reason = "has an execution plan"
    if reason is None:
        assert known is not None
        own, per_layer = known
        sizes = _sizes(model)
        uniform = _is_uniform(sizes) and not cut
        if own in SQUARE and sizes[0].queries * head_size(config) != config.hidden_size:
            uniform = False
        if not uniform and per_layer == "openelm" and not _is_tied(model):
            reason = "has a head of its own; openelm, the architecture for it, shares that with the embeddings"
        else:
            return own if uniform else per_layer
    raise UserError(
        f"{type(model).__name__} cannot be written as GGUF: it {reason}. Serve the saved folder itself with "
        "transformers, or export it with --format onnx."
    )


def file_of(folder: Path, quantize: str | None) -> Path:
    return folder / f"model-{quantize or 'f32'}.gguf"


def write(model: PreTrainedModel, tokenizer: Any, folder: Path, quantize: str | None) -> None:
    """Write ``model`` and its tokenizer as one file to ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    target = file_of(folder, quantize)
    if quantize not in _BY_TOOL:
        _write(model, tokenizer, target, quantize)
        return
    quantiser = _quantiser()
    plain = target.with_suffix(".f16.gguf")
    _write(model, tokenizer, plain, "f16")
    try:
        quantiser(plain, target, _BY_TOOL[quantize])
    finally:
        plain.unlink()


def compare(model: PreTrainedModel, tokenizer: Any, folder: Path, quantize: str | None) -> dict[str, Any]:
    """Greedy tokens, logarithms of the most likely ones, and the ids of texts; by llama.cpp (xllamacpp)."""
    if tokenizer is None or importlib.util.find_spec("xllamacpp") is None:
        return {"loaded_by": None}
    prompt = prompt_of(model)
    with tempfile.TemporaryDirectory() as place:
        request, answer = Path(place) / "request.json", Path(place) / "answer.json"
        asked = {"prompt": prompt[0].tolist(), "new_tokens": NEW_TOKENS, "likely": LIKELY, "texts": TEXTS}
        request.write_text(json.dumps(asked))
        run_alone(RUNNER, file_of(folder, quantize), request, answer)
        found = json.loads(answer.read_text())
    whole = torch.cat([prompt, torch.tensor([found["generated"]])], 1)
    with torch.no_grad():
        expected = model(whole).logits[0, prompt.shape[1] - 1 : -1].log_softmax(-1)
    answered = [(i, row) for i, row in enumerate(found["likely"]) if row]
    largest = max((abs(float(expected[i, id_]) - value) for i, row in answered for id_, value in row), default=0.0)
    same = [found["generated"][i] == int(row.argmax()) for i, row in enumerate(expected)]
    numbers = {
        "loaded_by": "llama.cpp",
        "largest_difference": largest,
        "largest_output": float(expected.abs().max()),
        "same_prediction": sum(same) / len(same),
        "greedy_tokens_equal": found["generated"] == greedy(model, prompt),
        "same_tokenization": found["tokens"] == [tokenizer(text).input_ids for text in TEXTS],
    }
    equal = numbers["greedy_tokens_equal"] and largest <= TOLERANCE * max(1.0, float(expected.abs().max()))
    return numbers | {"equal": numbers["same_tokenization"] and (equal or quantize is not None)}


def load(folder: Path, quantize: str | None, length: int, threads: int) -> GgufModel:
    """Run what is in ``folder`` by llama.cpp (xllamacpp)."""
    return GgufModel(file_of(folder, quantize), length, threads)


@dataclass(frozen=True)
class _Layer:
    """Query heads, key and value heads, neurons."""

    queries: int
    groups: int
    neurons: int


def _sizes(model: PreTrainedModel) -> list[_Layer]:
    size = head_size(model.config)
    found = []
    for path in family_of(model.config).layer_paths(model):
        layer: Any = model.get_submodule(path)
        attention, mlp = layer.self_attn, layer.mlp
        queries = groups = neurons = 0
        if not isinstance(attention, NoOp):
            queries, groups = _rows(attention.q_proj) // size, _rows(attention.k_proj) // size
        if not isinstance(mlp, NoOp):
            neurons = _rows(mlp.gate_proj)
        found.append(_Layer(queries, groups, neurons))
    return found


def _write(model: PreTrainedModel, tokenizer: Any, file: Path, quantize: str | None) -> None:
    import gguf

    config, architecture = model.config, architecture_of(model)
    writer = gguf.GGUFWriter(str(file), architecture)
    layers, size = _sizes(model), head_size(config)
    written = []
    for i, (path, layer) in enumerate(zip(family_of(config).layer_paths(model), layers, strict=True)):
        tensors, as_written = _tensors(model.get_submodule(path), layer, i, len(layers), architecture, config)
        written.append(as_written)
        for name, value in tensors:
            _add(writer, f"blk.{i}.{name}", value, quantize)
    base = getattr(model, model.base_model_prefix)
    _add(writer, "token_embd.weight", _numpy(base.embed_tokens.weight), quantize)
    _add(writer, "output_norm.weight", _numpy(base.norm.weight), quantize)
    if not _is_tied(model):
        _add(writer, "output.weight", _numpy(model.lm_head.weight), quantize)  # type: ignore[union-attr]
    per_layer = architecture in PER_LAYER
    columns = zip(*((layer.queries, layer.groups, layer.neurons) for layer in written), strict=True)
    queries, groups, neurons = (list(column) if per_layer else column[0] for column in columns)
    writer.add_head_count(queries)
    writer.add_head_count_kv(groups)
    writer.add_feed_forward_length(neurons)
    writer.add_block_count(len(layers))
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(base.embed_tokens.weight.shape[1])
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_rope_dimension_count(size)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type({None: 0, "f16": 1, "q4_0": 2, "q8_0": 7, "q5_0": 8}[quantize])
    _add_positions(writer, config, size)
    add_tokenizer(writer, tokenizer, config)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _tensors(
    layer: Any, sizes: _Layer, number: int, layers: int, architecture: str, config: Any
) -> tuple[list[tuple[str, _Array]], _Layer]:
    """(named tensors, sizes) of a layer as it is written, zeros included."""
    queries, groups, neurons = sizes.queries, sizes.groups, sizes.neurons
    width, size = config.hidden_size, head_size(config)
    found: list[tuple[str, _Array]] = []
    zero_heads = queries == 0 and (number == 0 or architecture == "openelm")
    if queries:
        found.append(("attn_norm.weight", _numpy(layer.input_layernorm.weight)))
        found += _attention(layer.self_attn, queries, groups, architecture)
    elif zero_heads:
        queries = groups = 1
        found.append(("attn_norm.weight", np.ones(width, np.float32)))
        found += _zero_attention(width, size, architecture)
    if neurons:
        added = -neurons % BLOCK
        found.append(("ffn_norm.weight", _numpy(layer.post_attention_layernorm.weight)))
        for name, module in (("ffn_gate", layer.mlp.gate_proj), ("ffn_up", layer.mlp.up_proj)):
            found.append((f"{name}.weight", np.pad(_numpy(module.weight), ((0, added), (0, 0)))))
        found.append(("ffn_down.weight", np.pad(_numpy(layer.mlp.down_proj.weight), ((0, 0), (0, added)))))
        neurons += added
    elif queries or number == layers - 1 or architecture == "openelm":
        neurons = BLOCK
        found.append(("ffn_norm.weight", np.ones(width, np.float32)))
        found += [(f"{name}.weight", np.zeros((neurons, width), np.float32)) for name in ("ffn_gate", "ffn_up")]
        found.append(("ffn_down.weight", np.zeros((width, neurons), np.float32)))
    return found, _Layer(queries, groups, neurons)


def _attention(attention: Any, queries: int, groups: int, architecture: str) -> Iterator[tuple[str, _Array]]:
    parts: dict[str, list[_Array]] = {"weight": [], "bias": []}
    interleaved = architecture in ("deci", "llama")  # pairs of rotary channels lie side by side there
    for module, heads in ((attention.q_proj, queries), (attention.k_proj, groups), (attention.v_proj, 0)):
        for name, value in (("weight", module.weight), ("bias", module.bias)):
            if value is not None:
                plain = _numpy(value)
                parts[name].append(_interleave(plain, heads) if interleaved and heads else plain)
    if architecture == "openelm":
        yield "attn_qkv.weight", np.concatenate(parts["weight"])
    else:
        for name, values in parts.items():
            yield from ((f"attn_{letter}.{name}", value) for letter, value in zip("qkv", values, strict=False))
    for letter in "qk":
        norm = getattr(attention, f"{letter}_norm", None)
        if norm is not None:
            yield f"attn_{letter}_norm.weight", _numpy(norm.weight)
    yield "attn_output.weight", _numpy(attention.o_proj.weight)
    if attention.o_proj.bias is not None:
        yield "attn_output.bias", _numpy(attention.o_proj.bias)


def _zero_attention(width: int, size: int, architecture: str) -> Iterator[tuple[str, _Array]]:
    if architecture == "openelm":
        yield "attn_qkv.weight", np.zeros((3 * size, width), np.float32)
        yield from ((f"attn_{letter}_norm.weight", np.ones(size, np.float32)) for letter in "qk")
    else:
        yield from ((f"attn_{letter}.weight", np.zeros((size, width), np.float32)) for letter in "qkv")
    yield "attn_output.weight", np.zeros((width, size), np.float32)


def _interleave(rows: _Array, heads: int) -> _Array:
    """Rotary channels i and i + d/2 of each head side by side."""
    half = rows.shape[0] // heads // 2
    return rows.reshape(heads, 2, half, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def _add(writer: Any, name: str, value: _Array, quantize: str | None) -> None:
    import gguf

    value = np.ascontiguousarray(value)
    if value.ndim == 1 or quantize is None:
        writer.add_tensor(name, value)
        return
    if quantize == "f16" or value.shape[-1] % BLOCK:
        writer.add_tensor(name, value.astype(np.float16))
        return
    kind = gguf.GGMLQuantizationType[quantize.upper()]
    writer.add_tensor(name, gguf.quants.quantize(value, kind), raw_dtype=kind)


def _add_positions(writer: Any, config: Any, size: int) -> None:
    import gguf

    rope = config.rope_parameters
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    kind = _rope_type(config)
    if kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))
    if kind == "llama3":
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
        plain = 1.0 / (float(rope["rope_theta"]) ** (torch.arange(0, size, 2, dtype=torch.int64).float() / size))
        writer.add_tensor("rope_freqs.weight", _numpy(plain / scaled))


def head_size(config: Any) -> int:
    """Channels of one head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _rope_type(config: Any) -> str:
    return str(config.rope_parameters.get("rope_type", "default"))


def _has_window(config: Any) -> bool:
    window = getattr(config, "sliding_window", None)
    return bool(window and getattr(config, "use_sliding_window", True) and window < config.max_position_embeddings)


def _is_uniform(layers: list[_Layer]) -> bool:
    return len(set(layers)) == 1 and layers[0].queries > 0 and layers[0].neurons > 0


def _is_tied(model: PreTrainedModel) -> bool:
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    return head is None or head.weight is embeddings.weight


def _rows(linear: nn.Linear) -> int:
    return int(linear.weight.shape[0])


def _numpy(tensor: torch.Tensor) -> _Array:
    return tensor.detach().float().cpu().numpy()  # type: ignore[no-any-return]


def _quantiser() -> Any:
    """What makes k-quants here: (plain file, target, kind) → None."""
    program = shutil.which("llama-quantize")
    if program is not None:
        return lambda plain, target, kind: _run([program, str(plain), str(target), kind])
    try:
        import llama_cpp
    except ImportError as error:
        raise UserError(
            "k-quants are made by llama.cpp, but llama-quantize is not on the PATH and llama-cpp-python is not "
            "installed. Install one of them, or choose q8_0, q5_0, q4_0 or f16."
        ) from error

    def by_binding(plain: Path, target: Path, kind: str) -> None:
        parameters = llama_cpp.llama_model_quantize_default_params()
        parameters.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
        if llama_cpp.llama_model_quantize(str(plain).encode(), str(target).encode(), parameters) != 0:
            raise UserError(f"llama.cpp could not quantise {plain} to {kind}.")

    return by_binding


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise UserError(f"{command[0]} failed: {(done.stderr or done.stdout).strip().splitlines()[-1]}")
