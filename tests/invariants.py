"""What must hold for a model of any type that has a table, and tiny models of any type of transformers.

Used by the tests and by ``scripts/census.py``, which looks for types that could have a table. Sizes are set by the
names that configs give them, so that a new type needs no line here unless its config has rules of its own.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tiny import (
    HEADS,
    LABELS,
    LAYERS,
    VOCABULARY,
    adapted,
    gap,
    hooks,
    logits,
    parts,
    random_plan,
    randomise,
    tiny_batch,
)
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedConfig,
    PreTrainedModel,
)

from apt_trainer import UserError, load_pruned
from apt_trainer.measure import count_flops, count_parameters
from apt_trainer.models import HIDDEN, Space, family_of
from apt_trainer.models.base import linear_shape
from apt_trainer.models.modeling_apt import STUB_KINDS
from apt_trainer.plan.cost import flops_cost, parameter_cost
from apt_trainer.plan.pruning_plan import PruningPlan
from apt_trainer.pruning.uniform_shape import check_stock
from apt_trainer.store.saved_model import as_pruned
from apt_trainer.surgery.adapters import adapters, grow_rank, merge_adapters
from apt_trainer.surgery.cutting import apply_plan
from apt_trainer.surgery.masks import MaskStore
from apt_trainer.surgery.slicing import EditLog

AUTO = (
    AutoModelForSeq2SeqLM,
    AutoModelForMaskedLM,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForImageClassification,
)
HEAD_CLASSES = (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoModelForQuestionAnswering,
    AutoModelForImageClassification,
)
WIDTH, NEURONS = 16, 20
_COMMON: dict[str, object] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embedding_size"), WIDTH),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers"), LAYERS),
    **dict.fromkeys(("decoder_layers", "num_decoder_layers"), LAYERS - 1),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "num_key_value_heads"), HEADS),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), HEADS),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "n_inner"), NEURONS),
    **dict.fromkeys(("hidden_dim", "d_ff"), NEURONS),
    **dict.fromkeys(("head_dim", "d_kv"), 6),
    **dict.fromkeys(("num_experts", "num_local_experts"), 5),
    "num_experts_per_tok": 2,
    "moe_intermediate_size": NEURONS,
    "image_size": 6,
    "patch_size": 2,
    "mlp_ratio": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 20,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "forced_eos_token_id": None,
    "layer_types": None,
    "sliding_window": 5,
}
_OWN: dict[str, dict[str, object]] = {
    "albert": {"embedding_size": 12},
    "deberta-v2": {
        "relative_attention": True,
        "position_buckets": 4,
        "pos_att_type": ["p2c", "c2p"],
        "share_att_key": True,
        "norm_rel_ebd": "layer_norm",
        "position_biased_input": False,
        "type_vocab_size": 0,
    },
    "electra": {"embedding_size": 12},
    "gptj": {"rotary_dim": 4},
    "gemma4_text": {"hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0, "global_head_dim": 10},
    "granite": {"residual_multiplier": 0.5, "embedding_multiplier": 2.0, "logits_scaling": 3.0},
    "helium": {"hidden_size": 32, "head_dim": 4},
    "hyperclovax": {"residual_multiplier": 0.5, "use_post_norm": True},
    "deit": {"architectures": ["DeiTForImageClassification"]},  # or no Auto class chooses among its classes
    "dinov2_with_registers": {"num_register_tokens": 5},
    "siglip": {
        "vision_config": {
            "hidden_size": WIDTH,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "intermediate_size": NEURONS,
            "image_size": 6,
            "patch_size": 2,
            "vision_use_head": False,
        },
        "text_config": {"num_hidden_layers": 1, "vocab_size": VOCABULARY},
    },
    "rembert": {"input_embedding_size": 12, "output_embedding_size": 14},
    "roformer": {"embedding_size": 12},
    "stablelm": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    "xlm-roberta-xl": {"type_vocab_size": 2},
}
"""What the configs of some types need beside ``_COMMON``, or what makes them more of a test."""


def config_of(model_type: str, **extra: object) -> PreTrainedConfig:
    """A tiny config: no two kinds of units are equally wide, and query heads are grouped where they can be."""
    stock = AutoConfig.for_model(model_type)
    known = {*stock.to_dict(), *getattr(type(stock), "attribute_map", {}), "pad_token_id", "bos_token_id"}
    sizes = {name: value for name, value in _COMMON.items() if name in known}
    if "num_key_value_heads" in known:
        sizes["num_attention_heads"] = 2 * HEADS
        if "head_dim" not in known:
            sizes["hidden_size"] = 2 * WIDTH  # heads of four channels
    return AutoConfig.for_model(model_type, **{**sizes, **_OWN.get(model_type, {}), **extra})


def model_of(model_type: str, **extra: object) -> PreTrainedModel:
    """A tiny model in evaluation mode with random weights everywhere; of a language model where there is one."""
    config = config_of(model_type, **extra)
    auto = next(auto for auto in AUTO if type(config) in auto._model_mapping)
    if auto is AutoModelForMaskedLM and getattr(config, "is_decoder", False):
        auto = AutoModelForCausalLM
    model: PreTrainedModel = auto.from_config(config)
    randomise(model, seed=1)
    return model.eval()


def models_with_heads(model_type: str) -> Iterator[PreTrainedModel]:
    """A tiny model for each task but language modelling that transformers has a class for."""
    for auto in HEAD_CLASSES:
        labels = 2 if auto is AutoModelForQuestionAnswering else LABELS
        config = config_of(model_type, num_labels=labels)
        if type(config) in auto._model_mapping:
            model = auto.from_config(config)
            randomise(model, seed=1)
            yield model.eval()


def close(a: torch.Tensor, b: torch.Tensor, within: float = 1e-5) -> bool:
    return gap(a, b) <= within * max(1.0, float(b.abs().max()))


def a_plan(spaces: list[Space], *kinds: str, gone: bool = False, seed: int = 31) -> PruningPlan:
    """Some units of each of ``kinds``, or of all; ``gone``: some sublayers lose all, the first of each stack too."""
    vanish = [space.name for i, space in enumerate(spaces[:-1]) if gone and not space.minimum and i % 3 == 0]
    return random_plan(
        spaces, PruningPlan.dense(spaces), seed, kinds or ("heads", "neurons", "experts", HIDDEN), vanish
    )


def cut(model: PreTrainedModel, plan: PruningPlan) -> PreTrainedModel:
    copied = copy.deepcopy(model)
    family, spaces, dense = parts(model)
    apply_plan(copied, family, spaces, dense, plan)
    return copied


def pruned_copy(model: PreTrainedModel, plan: PruningPlan) -> PreTrainedModel:
    small = cut(model, plan)
    as_pruned(small, family_of(model.config), plan)
    return small.eval()


def hidden_states(model: nn.Module, batch: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    with torch.no_grad():
        output = model(**batch, output_hidden_states=True)
    keys = [key for key in output if key.endswith("hidden_states")]
    return [state for key in keys for state in output[key]]


# ---------------------------------------------------------------------- what must hold


def every_width_is_claimed(model: PreTrainedModel) -> None:
    """Nothing else in a tiny model is as wide as its units, so that a forgotten slice shows."""
    _, spaces, _ = parts(model)
    claimed = {f"{part.module}/{part.side}" for space in spaces for part in space.slices}
    widths = {space.size * sum(part.parts) for space in spaces for part in space.slices} - {VOCABULARY, HEADS}
    for path, module in model.named_modules():
        weight = module._parameters.get("weight")
        if weight is None:
            continue
        if weight.dim() == 1 or isinstance(module, nn.Embedding):
            ends = {"out": weight.shape[-1]}
        else:
            ends = dict(zip(("out", "in"), linear_shape(module), strict=True))
        left = {f"{path}/{side}" for side, size in ends.items() if size in widths} - claimed
        assert not left, f"no space has {left}"


def masks_equal_the_cut(model: PreTrainedModel, *kinds: str, gone: bool = False) -> None:
    """With adapters everywhere; hidden states are those of the cut model with zeros between."""
    model = adapted(copy.deepcopy(model), everywhere=True)
    family, spaces, dense = parts(model)
    plan, batch = a_plan(spaces, *kinds, gone=gone), tiny_batch(model)
    before = logits(model, batch)
    hidden_states(model, batch)  # hooks of transformers, which stay
    number = hooks(model)
    store = MaskStore(model, spaces, family.sublayers(model))
    store.open(dense.counts)
    assert close(logits(model, batch), before), "masks of ones change something"
    store.move(dense.survivors(plan), 1.0)
    masked, wide = logits(model, batch), hidden_states(model, batch)
    store.close()
    assert hooks(model) == number and torch.equal(logits(model, batch), before)
    apply_plan(model, family, spaces, dense, plan)
    after, narrow = logits(model, batch), hidden_states(model, batch)
    assert close(masked, after, within=1e-4), f"masks and cut differ by {gap(masked, after)}"
    assert gap(before, after) > 1e-3, "the cut changes nothing"
    live = list(plan.kept[HIDDEN])
    for ours, theirs in zip(wide, narrow, strict=True):
        assert close(ours[..., live], theirs, within=1e-4), "hidden states differ"


def zeroed_outputs_equal_the_cut(model: PreTrainedModel) -> None:
    """An independent reference: output projections of a dense model that ignore the units that go. In double
    precision, since norms behind a sublayer raise rounding errors; heads that are normalised together stay, and what
    is in experts."""
    model = copy.deepcopy(model).double()
    model.config._experts_implementation = "eager"  # the faster one takes no double precision
    _, spaces, _ = parts(model)
    plan = a_plan(spaces, "heads", "neurons")
    stays = [space for space in spaces[:-1] if space.norms or space.gate_side != "input"]
    whole = {space.name: tuple(range(space.size)) for space in stays}
    plan = PruningPlan({**plan.kept, **whole})
    small = cut(model, plan)
    for space in spaces[:-1]:
        if space in stays:
            continue
        lost = torch.tensor(sorted(set(range(space.size)) - set(plan.kept[space.name])), dtype=torch.long)
        columns = (lost[:, None] * space.channels + torch.arange(space.channels)).reshape(-1)
        with torch.no_grad():
            model.get_submodule(str(space.gate)).weight[:, columns] = 0
    batch = tiny_batch(model)
    assert close(logits(small, batch), logits(model, batch))


def removed_sublayers_add_nothing(model: PreTrainedModel) -> None:
    """All of their weights are gone; reference: the dense model with zeros for what they write."""
    model = copy.deepcopy(model)
    family, spaces, dense = parts(model)
    plan = a_plan(spaces, "none", gone=True)
    small = cut(model, plan)
    gone = [sublayer for sublayer in family.sublayers(model) if not plan.kept[sublayer.space]]
    assert gone
    for sublayer in gone:
        for path in sublayer.modules:
            assert not list(small.get_submodule(path).parameters())
        assert all(type(small.get_submodule(stub.module)) in STUB_KINDS for stub in sublayer.stubs)
        assert sublayer.output and dense.counts[sublayer.space]


def costs_are_real(model: PreTrainedModel) -> None:
    """Parameters and FLOPs of a plan are those of the cut model."""
    family, spaces, _ = parts(model)
    plain = parameter_cost(model, family, spaces)
    whole = parameter_cost(model, family, spaces, blocks_only=False)
    flops = flops_cost(model, family, spaces, 3, 7)
    batch = {key: value for key, value in tiny_batch(model, padded=False, size=3, length=7).items()}
    batch.pop("labels")
    if model.config.is_encoder_decoder:
        batch["decoder_input_ids"] = batch["input_ids"]
    outside = set()
    for gone in (True, False):
        plan = PruningPlan({**a_plan(spaces, gone=gone).kept, HIDDEN: a_plan(spaces).kept[HIDDEN]})
        small = cut(model, plan)
        blocks = tuple(path + "." for path in family.block_modules(small))
        left = sum(p.numel() for key, p in small.named_parameters() if key.startswith(blocks))
        assert plain.total(plan.counts) == left, f"{plain.total(plan.counts)} parameters in blocks, really {left}"
        assert whole.total(plan.counts) == count_parameters(small)
        outside.add(count_flops(small, batch) - flops.total(plan.counts))
    assert len(outside) == 1, f"{outside} FLOPs are not foreseen, those of the head and the embeddings included"


def growth_changes_nothing(model: PreTrainedModel) -> None:
    model = copy.deepcopy(model)
    family, spaces, dense = parts(model)
    adapted(model)
    assert family.default_targets(model)
    apply_plan(model, family, spaces, dense, a_plan(spaces))
    batch = tiny_batch(model)
    expected = logits(model, batch)
    for path, layer in list(adapters(model)):
        grow_rank(path, layer, 5, torch.Generator().manual_seed(0), EditLog())
    assert close(logits(model, batch), expected)
    merge_adapters(model)
    assert not list(adapters(model)) and close(logits(model, batch), expected, within=1e-4)


def saves_and_loads(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """Returns the loaded model, some of whose sublayers are gone."""
    _, spaces, _ = parts(model)
    small, batch = pruned_copy(model, a_plan(spaces, gone=True)), tiny_batch(model)
    expected = logits(cut(model, a_plan(spaces, gone=True)), batch)
    assert torch.equal(logits(small, batch), expected)
    small.save_pretrained(folder)
    again = load_pruned(folder).eval()
    assert torch.equal(logits(again, batch), expected) and type(again) is type(small)
    assert count_parameters(again) == count_parameters(small)
    return again


def equal_layers_are_stock_or_refused(model: PreTrainedModel, folder: Path) -> None:
    """Fewer units of a kind in every layer, or fewer layers: a stock checkpoint that computes the same, or one
    sentence before anything is trained."""
    family, spaces, dense = parts(model)
    batch = tiny_batch(model)
    last = [f"{stack.spaces}.{len(family._layers(model, stack)) - 2}." for stack in family.stacks]
    fewer = {
        kind: {s.name: dense.kept[s.name][: s.size * 3 // 16 * 4 or s.size * 3 // 4] for s in spaces if s.kind == kind}
        for kind in dict.fromkeys(space.kind for space in spaces)
    }
    fewer["layers"] = {s.name: () for s in spaces if s.name.startswith(tuple(last)) and not s.minimum}
    for kind, kept in fewer.items():
        plan = PruningPlan({**dense.kept, **kept})
        try:
            check_stock(model, family, plan)
        except UserError as error:
            assert "no stock config" in str(error)
            continue
        small, target = pruned_copy(model, plan), folder / kind
        assert type(small) is type(model) and not hasattr(small.config, "apt_structure")
        expected = logits(cut(model, plan), batch)
        small.save_pretrained(target)
        again = type(model).from_pretrained(target).eval()
        assert close(logits(again, batch), expected), f"fewer {kind}: another model"


def heads_are_described(model_type: str, folder: Path) -> None:
    """Of every task: their sides of the hidden space, what trains in them, and how they load."""
    for model in models_with_heads(model_type):
        family, spaces, dense = parts(model)
        trained = family.trained_head(model)
        assert trained and all(list(model.get_submodule(path).parameters()) for path in trained)
        plan, batch = a_plan(spaces), tiny_batch(model)
        store = MaskStore(model, spaces, family.sublayers(model))
        store.open(dense.counts)
        store.move(dense.survivors(plan), 1.0)
        masked = logits(model, batch)
        store.close()
        small = pruned_copy(model, plan)
        assert close(masked, logits(small, batch)) and gap(masked, logits(model, batch)) > 1e-3, type(model).__name__
        small.save_pretrained(folder / type(model).__name__)
        assert torch.equal(logits(load_pruned(folder / type(model).__name__).eval(), batch), logits(small, batch))


def generates_with_a_cache(model: PreTrainedModel) -> None:
    """Greedily and with beams, for prompts that a decoder gets padded on the left, as without a cache."""
    if not model.can_generate():
        return
    batch = tiny_batch(model)
    batch.pop("labels")
    if not model.config.is_encoder_decoder:
        batch = {key: value.flip(1) for key, value in batch.items()}
    wanted = {"min_new_tokens": 6, "max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True}
    for beams in (1, 2):
        options: dict[str, Any] = {**wanted, "output_logits": True, "num_beams": beams}
        plain, cached = (model.generate(**batch, **options, use_cache=use) for use in (False, True))
        assert torch.equal(plain.sequences, cached.sequences)
        assert close(torch.stack(cached.logits), torch.stack(plain.logits))


def check(model_type: str) -> None:
    """Everything, for one type; raises AssertionError (or what the model raises) where something does not hold."""
    model = model_of(model_type)
    every_width_is_claimed(model)
    masks_equal_the_cut(model)
    masks_equal_the_cut(model, gone=True)
    zeroed_outputs_equal_the_cut(model)
    removed_sublayers_add_nothing(model)
    costs_are_real(model)
    growth_changes_nothing(model)
    with tempfile.TemporaryDirectory() as folder:
        generates_with_a_cache(saves_and_loads(model, Path(folder)))
        heads_are_described(model_type, Path(folder))
        equal_layers_are_stock_or_refused(model, Path(folder))
