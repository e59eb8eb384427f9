"""Vision transformers: patches of an image as tokens, a norm before each sublayer. Not their decoders, nor backbones.

The tokens that stand before the patches and the positions are parameters of the module that embeds the image.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from apt_trainer.models.base import Stub
from apt_trainer.models.family import Head, ModelFamily, StackTable, SublayerTable

ATTENTION = SublayerTable(
    "heads",
    "heads",
    reads={"attention.q_proj": ("q",), "attention.k_proj": ("k",), "attention.v_proj": ("v",)},
    writes="attention.o_proj",
    modules=("attention", "layernorm_before"),
    stubs=(Stub("attention", "zero_attention"), Stub("layernorm_before", "pass_first", masked=False)),
    norms=("layernorm_before",),
    head_dim=("attention", "head_dim"),
)
MLP = SublayerTable(
    "neurons",
    "neurons",
    reads={"mlp.fc1": ("n",)},
    writes="mlp.fc2",
    modules=("mlp", "layernorm_after"),
    stubs=(Stub("mlp", "zero_feed_forward"), Stub("layernorm_after", "pass_first", masked=False)),
    norms=("layernorm_after",),
)


_BEFORE = {"vit": 1, "vit_msn": 1, "deit": 2, "ijepa": 0, "dinov2": 1, "dinov2_with_registers": 1, "siglip": 0}
"""Model type → tokens before the patches, registers aside."""


def _tokens(config: Any) -> int:
    """What an image becomes."""
    vision = getattr(config, "vision_config", config)
    sizes = [
        size if isinstance(size, list | tuple) else (size, size) for size in (vision.image_size, vision.patch_size)
    ]
    (height, width), (high, wide) = sizes
    before = _BEFORE.get(config.model_type, 1) + getattr(config, "num_register_tokens", 0)
    return int(height // high) * int(width // wide) + int(before)


_BOTH = ("cls_classifier", "distillation_classifier")
VIT = ModelFamily(
    model_types=("vit", "vit_msn", "deit", "ijepa"),
    stacks=(StackTable("layers", (ATTENTION, MLP), final_norms=("layernorm",)),),
    embeddings=("embeddings.patch_embeddings.projection", "embeddings"),
    base_reads=("pooler.dense",),
    trained_base=("pooler",),
    adapter_targets=("q_proj", "v_proj", "fc1"),
    tokens=_tokens,
    heads={
        "ForImageClassification": Head(reads=("classifier",), trained=("classifier",)),
        "ForImageClassificationWithTeacher": Head(reads=_BOTH, trained=_BOTH),
    },
    config_sizes={
        "heads": ("num_attention_heads",),
        "head_dim": ("head_dim",),
        "neurons": ("intermediate_size",),
        "hidden": ("hidden_size",),
        "layers": ("num_hidden_layers",),
    },
)


def _scaled(table: SublayerTable, norm: str, scale: str) -> SublayerTable:
    """With ``scale`` between what ``table`` writes and the residual stream, which is cut and masked as a norm is."""
    return replace(
        table,
        modules=(table.modules[0], norm, scale),
        stubs=(table.stubs[0], *(Stub(name, "pass_first", masked=False) for name in (norm, scale))),
        norms=(norm, scale),
        closing=(scale,),
    )


def _without_gate(config: Any) -> str | None:
    if config.use_swiglu_ffn:
        return "it is supported with use_swiglu_ffn=False (all sizes but giant)"
    return None


DINOV2 = replace(
    VIT,
    model_types=("dinov2", "dinov2_with_registers"),
    stacks=(
        StackTable(
            "encoder.layer",
            (_scaled(ATTENTION, "norm1", "layer_scale1"), _scaled(MLP, "norm2", "layer_scale2")),
            final_norms=("layernorm",),
        ),
    ),
    # Its classifier reads the first token and the mean of the patches, side by side.
    heads={"ForImageClassification": Head(reads=("classifier", "classifier"), trained=("classifier",))},
    config_sizes={kind: names for kind, names in VIT.config_sizes.items() if kind in ("heads", "head_dim", "layers")},
    unsupported=_without_gate,
)


def _without_pooling(config: Any) -> str | None:
    if config.vision_config.vision_use_head:
        return (
            "its pooling head, which a classifier of images does not read, cannot be cut. Load the config with "
            "AutoConfig, set config.vision_config.vision_use_head = False, save "
            "SiglipForImageClassification.from_pretrained(..., config=config) to a folder and name that"
        )
    return None


def _of_siglip(table: SublayerTable, norm: str, **changes: Any) -> SublayerTable:
    module = table.modules[0] if table.kind == "neurons" else "self_attn"
    stubs = (replace(table.stubs[0], module=module), Stub(norm, "pass_first", masked=False))
    return replace(table, modules=(module, norm), stubs=stubs, norms=(norm,), **changes)


# The half of the model that sees; the class for images has no other.
SIGLIP = replace(
    VIT,
    model_types=("siglip",),
    stacks=(
        StackTable(
            "vision_model.encoder.layers",
            (
                _of_siglip(
                    ATTENTION,
                    "layer_norm1",
                    reads={"self_attn.q_proj": ("q",), "self_attn.k_proj": ("k",), "self_attn.v_proj": ("v",)},
                    writes="self_attn.out_proj",
                    head_dim=("self_attn", "head_dim"),
                ),
                _of_siglip(MLP, "layer_norm2"),
            ),
            final_norms=("vision_model.post_layernorm",),
        ),
    ),
    embeddings=(
        "vision_model.embeddings.patch_embedding",
        "vision_model.embeddings.position_embedding",
        "vision_model.embeddings",
    ),
    base_reads=(),
    trained_base=(),
    config_sizes={},
    unsupported=_without_pooling,
)
