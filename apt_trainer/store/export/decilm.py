"""The model class of vLLM for layers of different size, ``DeciLMForCausalLM``: layers may lack one or both sublayers.

All layers have as many query heads as the dense model, which key and value heads must divide: heads of zeros fill up.
Layer 0 must have its attention. The folder carries the config class, which vLLM loads with ``--trust-remote-code``,
and the same model for transformers, by which the export is checked.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import CONFIG_NAME

from apt_trainer.errors import UserError
from apt_trainer.models import family_of
from apt_trainer.models.modeling_apt import REMOTE_CODE, NoOp
from apt_trainer.store.events import write_json
from apt_trainer.store.export import hf
from apt_trainer.store.export.check import compare_logits
from apt_trainer.store.export.gguf import architecture_of, head_size
from apt_trainer.store.export.hf import IS_RUN, QUANTIZATIONS, file_of
from apt_trainer.store.export.per_layer_config import HEADS
from apt_trainer.store.saved_model import dense_shape

__all__ = ["IS_RUN", "QUANTIZATIONS", "compare", "file_of", "refuse", "write"]

CODE = Path(__file__).with_name("modeling_decilm.py")
_INSTEAD = "Export it with --style per_layer_config, or prune it to equal layers (shape: uniform)."


def refuse(model: PreTrainedModel, tokenizer: Any, quantize: str | None, cut: bool = False) -> None:
    """Raise :class:`UserError` for a model whose layers are not those of LLaMA, or that needs no description."""
    hf.refuse(model, tokenizer, quantize, cut)
    config, reason = model.config, None
    if "deci" not in family_of(config).gguf.get(_type(config), ()):
        alike = family_of(config).config_sizes.get("heads") == HEADS
        reason = f"its layers are not those of LLaMA. {_INSTEAD if alike else 'Leave --style out.'}"
    elif getattr(config, "attention_bias", False) or _has_biases(model):
        reason = f"its attentions have biases. {_INSTEAD}"
    elif not hasattr(config, "apt_structure") and not cut:
        reason = "its layers are alike, so that any server loads the saved folder itself. Leave --style out."
    elif not getattr(config, REMOTE_CODE, True):
        reason = "vLLM reads it by the code in its folder, which remote_code: false leaves out."
    if reason is not None:
        raise UserError(f"{type(model).__name__} is not written for DeciLMForCausalLM: {reason}")
    architecture_of(model, cut)  # which has no windows either, nor other activations or positions


def write(model: PreTrainedModel, tokenizer: Any, folder: Path, quantize: str | None) -> None:
    """Write ``model`` under the names of LLaMA, with ``block_configs``."""
    base: Any = getattr(model, model.base_model_prefix)
    weights: dict[str, Tensor] = {}
    blocks, width = [], base.embed_tokens.weight.shape[1]
    for i, layer in enumerate(base.layers):
        tensors, block = _layer(layer, i, model.config, width)
        weights |= {f"model.layers.{i}.{name}": value for name, value in tensors.items()}
        blocks.append(block)
    weights |= {"model.embed_tokens.weight": base.embed_tokens.weight, "model.norm.weight": base.norm.weight}
    head: Any = model.get_output_embeddings()
    tied = head.weight is base.embed_tokens.weight
    if not tied:
        weights["lm_head.weight"] = head.weight
    _, config = dense_shape(model.config)
    described = config.to_dict()
    described |= {
        "model_type": "nemotron-nas",
        "architectures": ["DeciLMForCausalLM"],
        "auto_map": {
            "AutoConfig": f"{CODE.stem}.DeciLMConfig",
            "AutoModel": f"{CODE.stem}.DeciLMModel",
            "AutoModelForCausalLM": f"{CODE.stem}.DeciLMForCausalLM",
        },
        "block_configs": blocks,
        "head_dim": head_size(model.config),
        "hidden_size": width,
        "tie_word_embeddings": tied,
        "dtype": str(model.dtype).removeprefix("torch."),
    }
    folder.mkdir(parents=True)
    write_json(folder / CONFIG_NAME, described)
    (folder / CODE.name).write_bytes(CODE.read_bytes())
    save_torch_state_dict({name: value.detach().contiguous() for name, value in weights.items()}, folder)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)


def compare(model: PreTrainedModel, tokenizer: Any, folder: Path, quantize: str | None) -> dict[str, Any]:
    """Logits of several shapes with padding and greedy tokens with the cache; by transformers."""
    return compare_logits(model, hf.RUNNER, folder, quantize) | {"loaded_by": "transformers"}


def _layer(layer: Any, number: int, config: Any, width: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(weights by their names in the layer, what ``block_configs`` says of it)"""
    weights: dict[str, Tensor] = {}
    attention: dict[str, Any] = {"no_op": True, "n_heads_in_group": None}
    ffn: dict[str, Any] = {"no_op": True, "intermediate_size": None}
    if not isinstance(layer.self_attn, NoOp) or number == 0:
        group, projections = _attention(layer.self_attn, config, width)
        attention = {"no_op": False, "n_heads_in_group": group}
        weights |= {f"self_attn.{name}.weight": value for name, value in projections.items()}
        weights["input_layernorm.weight"] = getattr(layer.input_layernorm, "weight", torch.ones(width))
    if not isinstance(layer.mlp, NoOp):
        ffn = {"no_op": False, "intermediate_size": layer.mlp.gate_proj.weight.shape[0]}
        names = ("gate_proj", "up_proj", "down_proj")
        weights |= {f"mlp.{name}.weight": getattr(layer.mlp, name).weight for name in names}
        weights["post_attention_layernorm.weight"] = layer.post_attention_layernorm.weight
    return weights, {"attention": attention, "ffn": ffn}


def _attention(attention: Any, config: Any, width: int) -> tuple[int, dict[str, Tensor]]:
    """(query heads per key and value head, projections) with heads of zeros where the number needs them."""
    queries, size = config.num_attention_heads, head_size(config)
    of_dense = queries // config.num_key_value_heads
    gone = isinstance(attention, NoOp)
    left = 0 if gone else attention.k_proj.weight.shape[0] // size
    groups = next(number for number in range(max(left, 1), queries + 1) if queries % number == 0)
    each = queries // groups
    filled = {
        "q_proj": torch.zeros(groups, each, size, width),
        "k_proj": torch.zeros(groups, size, width),
        "v_proj": torch.zeros(groups, size, width),
        "o_proj": torch.zeros(width, groups, each, size),
    }
    if not gone:
        filled["q_proj"][:left, :of_dense] = attention.q_proj.weight.view(left, of_dense, size, width)
        filled["k_proj"][:left] = attention.k_proj.weight.view(left, size, width)
        filled["v_proj"][:left] = attention.v_proj.weight.view(left, size, width)
        filled["o_proj"][:, :left, :of_dense] = attention.o_proj.weight.view(width, left, of_dense, size)
    flat = {name: value.reshape(-1, width) for name, value in filled.items() if name != "o_proj"}
    return each, flat | {"o_proj": filled["o_proj"].reshape(width, -1)}


def _type(config: Any) -> str:
    return str(getattr(config, "apt_base_model_type", None) or config.model_type)


def _has_biases(model: PreTrainedModel) -> bool:
    base: Any = getattr(model, model.base_model_prefix)
    return any(name.endswith("_proj.bias") for name, _ in base.layers.named_parameters())
