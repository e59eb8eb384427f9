"""Mixtures of experts in the layout of LLaMA: each layer has a router and experts in the place of its feed-forward.

Not with a shared expert beside them, nor with layers that have none.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from apt_trainer.models.families.llama import ATTENTION, CONFIG_SIZES, MLP, SMOLLM3
from apt_trainer.models.family import ExpertsTable, ModelFamily, SublayerTable

_THROUGH_ACTIVATION = ("eager", "grouped_mm", "batched_mm")
"""How transformers may run experts: these ways go through the module of their activation, which is watched."""


_EXPERTS = replace(MLP, reads={}, writes="mlp", experts=ExpertsTable())


def _as_described(config: Any) -> str | None:
    if getattr(config, "mlp_only_layers", None) or getattr(config, "decoder_sparse_step", 1) != 1:
        return "it is supported with experts in every layer (mlp_only_layers: [], decoder_sparse_step: 1)"
    if getattr(config, "output_router_logits", False):
        return (
            "it is supported with output_router_logits: false: the loss that balances the load of experts takes as "
            "many in every layer"
        )
    way = getattr(config, "_experts_implementation", None) or "eager"
    if way not in _THROUGH_ACTIVATION:
        return f"it is supported with experts_implementation {', '.join(_THROUGH_ACTIVATION)}, not {way}"
    return None


def _of(
    model_type: str, neurons: str, experts: str = "num_local_experts", attention: SublayerTable = ATTENTION
) -> ModelFamily:
    """``neurons`` and ``experts``: fields of the config."""
    return replace(
        SMOLLM3,
        model_types=(model_type,),
        stacks=(replace(SMOLLM3.stacks[0], sublayers=(attention, _EXPERTS)),),
        adapter_targets=("q_proj", "v_proj"),
        unsupported=_as_described,
        config_sizes={**CONFIG_SIZES, "neurons": (neurons,), "experts": (experts,)},
    )


MIXTRAL = _of("mixtral", "intermediate_size")
QWEN3_MOE = _of("qwen3_moe", "moe_intermediate_size", "num_experts")

# Queries and keys of all heads are normalised together.
OLMOE = _of(
    "olmoe",
    "intermediate_size",
    attention=replace(ATTENTION, inner={"self_attn.q_norm": ("q",), "self_attn.k_norm": ("k",)}),
)
