"""Tiny models of every family and task, whose weights are random everywhere: norms, biases and adapters included.

With norms at 1, biases at 0 and B at 0, as models are made, equalities would hold for the wrong reasons.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.pytorch_utils import Conv1D

from apt_trainer.models import HIDDEN, ModelFamily, Space, family_of
from apt_trainer.plan.pruning_plan import PruningPlan
from apt_trainer.surgery.adapters import insert_adapters

FAMILY_NAMES = ("bert", "roberta", "xlm-roberta", "distilbert")
TASKS = {
    "ForSequenceClassification": AutoModelForSequenceClassification,
    "ForTokenClassification": AutoModelForTokenClassification,
    "ForQuestionAnswering": AutoModelForQuestionAnswering,
    "ForMaskedLM": AutoModelForMaskedLM,
}
CASES = [(family, task) for family in FAMILY_NAMES for task in TASKS]
"""The encoders that share their sizes, so that numbers can be asserted; every family is in ``LANGUAGE_MODELS``."""

LANGUAGE_MODELS = {
    "llama": "ForCausalLM",
    "mistral": "ForCausalLM",
    "qwen2": "ForCausalLM",
    "qwen3": "ForCausalLM",
    "gpt2": "ForCausalLM",
    "gemma2": "ForCausalLM",
    "gemma3_text": "ForCausalLM",
    "smollm3": "ForCausalLM",
    "olmo2": "ForCausalLM",
    "phi3": "ForCausalLM",
    "t5": "ForConditionalGeneration",
    "mt5": "ForConditionalGeneration",
    "opt": "ForCausalLM",
    "gpt_neox": "ForCausalLM",
    "modernbert": "ForMaskedLM",
}
ALL_TASKS = TASKS | {"ForCausalLM": AutoModelForCausalLM, "ForConditionalGeneration": AutoModelForSeq2SeqLM}

WIDTH, HEADS, HEAD_DIM, NEURONS, LAYERS, LABELS, VOCABULARY = 16, 4, 4, 24, 3, 3, 40


def tiny_config(family: str, layers: int = LAYERS, dropout: float = 0.0, **extra: object) -> PreTrainedConfig:
    if family in LANGUAGE_MODELS:
        sizes = _of_language_model(family, layers, dropout)
    elif family == "distilbert":
        sizes = {"dim": WIDTH, "n_heads": HEADS, "hidden_dim": NEURONS, "n_layers": layers}
        sizes |= {
            "dropout": dropout,
            "attention_dropout": dropout,
            "seq_classif_dropout": dropout,
            "qa_dropout": dropout,
        }
    else:
        sizes = {"hidden_size": WIDTH, "num_attention_heads": HEADS, "intermediate_size": NEURONS}
        sizes |= {"num_hidden_layers": layers, "hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    common = {"vocab_size": VOCABULARY, "max_position_embeddings": 20, "pad_token_id": 1}
    return AutoConfig.for_model(family, **{**common, **sizes, **extra})


def _of_language_model(family: str, layers: int, dropout: float) -> dict[str, object]:
    """Sizes of a decoder or of a model with two stacks; no two kinds of units are equally wide."""
    sizes: dict[str, object] = {"bos_token_id": 0, "eos_token_id": 2, "attention_dropout": dropout}
    grouped = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 6}  # 4 units of 12 channels
    common = {"hidden_size": WIDTH, "num_hidden_layers": layers, "intermediate_size": 20}
    windows = {
        "sliding_window": 5,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"][:layers],
    }
    stacks = {"d_model": WIDTH, "d_kv": 6, "num_heads": HEADS, "d_ff": 20, "dropout_rate": dropout}
    stacks |= {"num_layers": layers, "num_decoder_layers": max(1, layers - 1)}
    special: dict[str, dict[str, object]] = {
        "llama": grouped | {"attention_bias": True},
        "mistral": grouped | {"sliding_window": 5},
        "qwen2": grouped | {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
        "qwen3": grouped,
        "gpt2": {"attn_pdrop": dropout, "resid_pdrop": dropout, "embd_pdrop": dropout, "n_inner": 20},
        "gemma2": grouped | windows,
        "gemma3_text": grouped | windows,
        "smollm3": grouped | {"no_rope_layers": [1, 0, 1][:layers]},
        "olmo2": grouped,
        "phi3": grouped | {"resid_pdrop": dropout},
        "t5": stacks | {"feed_forward_proj": "relu"},
        "mt5": stacks | {"feed_forward_proj": "gated-gelu"},
        "opt": {"ffn_dim": 20, "word_embed_proj_dim": WIDTH, "dropout": dropout},
        "gpt_neox": {"num_attention_heads": HEADS, "hidden_dropout": dropout},
        "modernbert": {"num_attention_heads": HEADS, "local_attention": 6, "cls_token_id": 0, "sep_token_id": 2},
    }
    if family in ("t5", "mt5"):
        return {"eos_token_id": 2, "decoder_start_token_id": 1} | special[family]
    if family in ("gpt2", "opt"):
        common |= {"num_attention_heads": HEADS}
    return sizes | common | special[family]


def tiny_model(
    family: str, task: str = "ForSequenceClassification", layers: int = LAYERS, dropout: float = 0.0, **extra: object
) -> PreTrainedModel:
    """Dense model in evaluation mode; equal arguments give equal weights."""
    labels = 2 if task == "ForQuestionAnswering" else LABELS
    model = ALL_TASKS[task].from_config(tiny_config(family, layers, dropout, num_labels=labels, **extra))
    randomise(model, seed=1)
    return model.eval()


@torch.no_grad()
def randomise(model: nn.Module, seed: int) -> None:
    """Draw every parameter that is not fixed anew: norms' weights around 1, others around 0, smaller where scores are
    not scaled."""
    generator = torch.Generator().manual_seed(seed)
    norms = {id(m.weight) for m in model.modules() if type(m).__name__.endswith("Norm") and hasattr(m, "weight")}
    for parameter in (p for p in model.parameters() if p.requires_grad):
        drawn = torch.randn(parameter.shape, generator=generator) * 0.3
        parameter.copy_(1 + drawn if id(parameter) in norms else drawn)
    for name, parameter in model.named_parameters():
        if name.endswith(("Attention.q.weight", "Attention.k.weight")):
            parameter.mul_(0.5)


def adapted(model: PreTrainedModel, rank: int = 3, everywhere: bool = False) -> PreTrainedModel:
    """``model`` with adapters whose B is not zero, on the targets of its family or on every linear of its layers."""
    family = family_of(model.config)
    names: Iterable[str] = family.default_targets(model)
    if everywhere:
        spaces = family.spaces(model)[:-1]
        linears = {part.module for space in spaces for part in space.slices if part.module not in space.norms}
        linears = {path for path in linears if isinstance(model.get_submodule(path), nn.Linear | Conv1D)}
        layers = tuple(path + "." for path in family.layer_paths(model))
        names = {path.removeprefix(next(p for p in layers if path.startswith(p))) for path in linears}
    insert_adapters(model, sorted(names), rank, 2.0 * rank, 0.0, family.layer_paths(model))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def tiny_batch(model: PreTrainedModel, padded: bool = True, size: int = 4, length: int = 7) -> dict[str, torch.Tensor]:
    """Batch with labels; ``padded`` ends the sequences at different lengths."""
    generator = torch.Generator().manual_seed(3)
    if model.main_input_name == "pixel_values":
        config = getattr(model.config, "vision_config", model.config)
        shape = (size, config.num_channels, config.image_size, config.image_size)
        labels = torch.randint(model.config.num_labels, (size,), generator=generator)
        return {"pixel_values": torch.randn(shape, generator=generator), "labels": labels}
    ids = torch.randint(4, VOCABULARY, (size, length), generator=generator)
    mask = torch.ones_like(ids)
    if padded:
        for row in range(size):
            mask[row, length - row % 4 :] = 0
    ids = torch.where(mask.bool(), ids, 1)
    name = type(model).__name__
    two_stacks = model.config.is_encoder_decoder
    if two_stacks and name.endswith("ForSequenceClassification"):  # looks for the end of each text
        ids[torch.arange(size), mask.sum(1) - 1] = model.config.eos_token_id
    batch = {"input_ids": ids, "attention_mask": mask}
    if name.endswith("ForSequenceClassification"):
        batch["labels"] = torch.randint(LABELS, (size,), generator=generator)
    elif name.endswith("ForQuestionAnswering"):
        batch["start_positions"] = torch.randint(3, (size,), generator=generator)
        batch["end_positions"] = torch.randint(3, (size,), generator=generator)
    elif two_stacks and not name.endswith("ForTokenClassification"):  # as long as no input, and padded in other rows
        labels = torch.randint(4, VOCABULARY, (size, length - 2), generator=generator)
        kept = torch.arange(length - 2) < length - 2 - torch.arange(size)[:, None].flip(0) % 3
        batch["labels"] = torch.where(kept | (not padded), labels, -100)
    else:
        classes = LABELS if name.endswith("ForTokenClassification") else VOCABULARY
        labels = torch.randint(classes, (size, length), generator=generator)
        batch["labels"] = torch.where(mask.bool(), labels, -100)
    return batch


def logits(model: nn.Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """All predictions [batch, …] in one tensor."""
    with torch.no_grad():
        output = model(**batch)
    if hasattr(output, "start_logits"):
        return torch.stack([output.start_logits, output.end_logits])
    return output.logits


def parts(model: PreTrainedModel) -> tuple[ModelFamily, list[Space], PruningPlan]:
    """(family, spaces, plan) of a dense model."""
    family = family_of(model.config)
    spaces = family.spaces(model)
    return family, spaces, PruningPlan.dense(spaces)


def random_plan(
    spaces: Sequence[Space],
    current: PruningPlan,
    seed: int,
    kinds: Sequence[str] = ("heads", "neurons", "hidden"),
    vanish: Sequence[str] = (),
) -> PruningPlan:
    """Part of the units of every space of ``kinds``, drawn at random; no unit of the spaces in ``vanish``.

    What experts are wide in are multiples of four, 16 bytes: grouped matrix products take no others."""
    multiple = 4 if any(space.kind == "experts" for space in spaces) else 1
    generator = torch.Generator().manual_seed(seed)
    kept = dict(current.kept)
    for space in spaces:
        units = kept[space.name]
        if space.name in vanish:
            kept[space.name] = ()
        elif space.kind in kinds and units:
            least = 5 if space.name == HIDDEN else max(1, space.minimum)
            number = int(torch.randint(min(least, len(units)), len(units) + 1, (), generator=generator))
            if space.kind in ("neurons", "hidden"):
                number = max(multiple, number // multiple * multiple)
            chosen = torch.randperm(len(units), generator=generator)[:number].sort().values
            kept[space.name] = tuple(units[i] for i in chosen.tolist())
    return PruningPlan(kept)


def gap(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest absolute difference."""
    return float((a - b).abs().max())


def hooks(model: nn.Module) -> int:
    """How many forward and backward hooks hang in ``model``."""
    return sum(
        len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) + len(m._backward_pre_hooks)
        for m in model.modules()
    )
