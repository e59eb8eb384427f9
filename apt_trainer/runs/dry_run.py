"""What a recipe would do, without weights: sizes, schedule, budgets and a memory estimate.

The data are read (the number of steps depends on them), the model is built on the meta device. A latency budget is the
exception: it is measured, so the model is built with random weights. Not for running anything.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from apt_trainer.errors import UserError
from apt_trainer.models import HIDDEN, family_of
from apt_trainer.models.parts import weigh_parts
from apt_trainer.plan.cost import flops_cost, parameter_cost
from apt_trainer.plan.pruning_plan import PruningPlan
from apt_trainer.plan.schedule import Schedule, fewer_events, make_schedule
from apt_trainer.pruning.pruner import AdaptivePruner
from apt_trainer.report.tables import format_bytes, format_count, markdown_table
from apt_trainer.runs.preflight import check_before_loading, check_installed, checkpoint_to_resume
from apt_trainer.runs.process_memory import process_lines, weigh
from apt_trainer.runs.vocabulary import vocabulary_cut
from apt_trainer.settings.config import APTConfig
from apt_trainer.settings.recipe import Recipe
from apt_trainer.store.pretrained import build_model, dtype_name, load_inputs, source_of
from apt_trainer.store.starting_point import starting_point
from apt_trainer.surgery import adapters as lora
from apt_trainer.surgery.frozen_base import BYTES, base_linears
from apt_trainer.tasks import TaskData
from apt_trainer.tasks.trainer_options import set_task_arguments

_ADAM_BYTES = 8  # two fp32 moments per trained parameter
_LABELS_SHOWN = 20
_COUNTED = {
    "params": "the parameters in blocks",
    "total_params": "all parameters",
    "flops": "the FLOPs of blocks",
    "latency": "the measured time",
    "memory": "the memory of inference",
}
"""What each ``sparsity_metric`` counts, in words."""
_FLOAT32_PER_LOGIT = 3  # log-probability, its gradient and that of the logit


def plan(recipe: Recipe, processes: int = 1) -> str:
    """Text of the dry run; raises :class:`UserError` for anything that would stop the run before training.

    ``processes``: more than one: what each of so many would hold of the weights is told too.
    """
    if processes < 1:
        raise UserError(f"--processes {processes} must be at least 1.")
    checkpoint_to_resume(recipe)
    check_installed(recipe)
    with TemporaryDirectory() as folder, vocabulary_cut(recipe, Path(folder) / "vocabulary", weights=False) as cut:
        return _plan(*cut, processes)


def _plan(recipe: Recipe, vocabulary: Mapping[str, Any], processes: int) -> str:
    args = recipe.training
    tokenizer, config, data = load_inputs(recipe.model, recipe)
    set_task_arguments(args, data, recipe.given)
    check_before_loading(recipe, config, data, tokenizer)
    timed = args.sparsity_metric == "latency"
    model = build_model(config, data, str(args.device) if timed else "meta", recipe.model.dtype)
    pruner = AdaptivePruner(model, args, seed=args.seed)
    rows = len(data.train)
    held = args.heldout_rows(rows)
    schedule = make_schedule(args, args.total_steps(rows - held))
    length = pruner.family.tokens(model.config) or recipe.data.max_length
    predicted = recipe.data.max_target_length if model.config.is_encoder_decoder else length
    memory = memory_estimate(model, args, length, predicted)
    lines = [
        f"model        {type(model).__name__}, {format_count(sum(p.numel() for p in model.parameters()))} parameters "
        f"with adapters, {format_count(pruner.block_cost.total(pruner.plan.counts))} in blocks{_of_original(pruner)}",
        _part_line(pruner),
        f"data         {rows:,} training rows, {_held_out(held)}{len(data.validation):,} validation, "
        f"{len(data.test):,} reported on ({data.test_name})",
        *_label_lines(data),
        *_vocabulary_lines(vocabulary),
        f"trains       {' → '.join(tune_phases(args))}; {format_count(_trained(model))} parameters at first",
        *_target_lines(pruner, schedule),
        f"steps        {schedule.total:,} of {args.train_batch_size * args.gradient_accumulation_steps} rows",
        f"memory       {format_bytes(memory)} estimated at the first step "
        f"({_counted(model, args)}){_of_model_at_first(pruner, args)}",
        *_process_lines(pruner, schedule, recipe, config, processes),
        *([f"timed        on {args.device}, with weights in {dtype_name(model.dtype)}"] if timed else []),
        *([f"exports      {', '.join(args.export)}"] if args.export else []),
        "",
        _space_table(pruner),
        "",
        *_shape_lines(pruner, schedule),
    ]
    return "\n".join(lines + _schedule_lines(pruner, schedule, args))


def _part_line(pruner: AdaptivePruner) -> str:
    """What the parts of the model weigh, and their shares of its parameters."""
    parts = weigh_parts(pruner.model, pruner.family)
    whole = sum(weight.params for weight in parts.values())
    told = [
        f"{part} {format_count(weight.params)} parameters ({weight.params / whole:.1%}, {format_bytes(weight.bytes)})"
        for part, weight in parts.items()
        if weight.params
    ]
    return f"weighs       {', '.join(told)}"


def _target_lines(pruner: AdaptivePruner, schedule: Schedule) -> list[str]:
    """What the target means for the blocks and for all of the model."""
    if not schedule.events:
        return []
    target = schedule.target_sparsity
    blocks, whole = pruner.budget.removed_parameters(evenly_cut(pruner, target))
    metric = pruner.settings.sparsity_metric
    told = f"target       {target:.1%} of {_COUNTED[metric]}"
    if metric == "params":
        return [f"{told} (about {whole:.1%} of all parameters)"]
    return [f"{told}: about {blocks:.1%} of the parameters in blocks, {whole:.1%} of all parameters"]


def _process_lines(
    pruner: AdaptivePruner, schedule: Schedule, recipe: Recipe, config: Any, processes: int
) -> list[str]:
    if processes == 1:
        return []
    finished = evenly_cut(pruner, schedule.target_sparsity) if schedule.events else pruner.plan
    converted = source_of(recipe.model).gguf_file is not None or config.dtype not in (None, pruner.model.dtype)
    return process_lines(weigh(pruner, finished), processes, schedule.before, converted)


def _held_out(rows: int) -> str:
    return f"{rows:,} of them held out to choose the teacher (heldout_fraction), " if rows else ""


def _label_lines(data: TaskData) -> list[str]:
    """How often each label occurs in the training rows, and what it weighs."""
    if not data.label_counts:
        return []
    names = sorted(data.label_counts, key=lambda name: -data.label_counts[name])
    if len(names) > _LABELS_SHOWN:  # the most and the least frequent
        names = [*names[: _LABELS_SHOWN // 2], "…", *names[-_LABELS_SHOWN // 2 :]]
    weights = dict(zip(data.label_counts, data.class_weights or (), strict=False))
    told = [
        name
        if name not in data.label_counts
        else f'"{name}" × {data.label_counts[name]:,}{_weight(weights.get(name))}'
        for name in names
    ]
    return [f"labels       {len(data.label_counts)} in the training rows: {', '.join(told)}"]


def _vocabulary_lines(vocabulary: Mapping[str, Any]) -> list[str]:
    """How many tokens stay, and what that costs text that they were not chosen by."""
    if not vocabulary:
        return []
    more = vocabulary["validation_tokens"] / vocabulary["validation_tokens_before"] - 1
    changed = vocabulary["training_rows_changed"]
    return [
        f"vocabulary   {vocabulary['tokens']:,} of {vocabulary['tokens_before']:,} tokens stay; validation rows take "
        f"{more:.1%} more tokens, {changed:,} training rows are split otherwise"
    ]


def _weight(weight: float | None) -> str:
    return "" if weight is None else f" (weight {weight:.3g})"


def _of_original(pruner: AdaptivePruner) -> str:
    """Of a model that was pruned before, what it has of its dense original."""
    if not pruner.origin.is_pruned:
        return ""
    dense = format_count(pruner.block_cost.total(pruner.dense_plan.counts))
    lost = f"{pruner.sparsity():.1%} of {pruner.settings.sparsity_metric} removed before"
    return f" ({lost}; {dense} in the dense original)"


def _of_model_at_first(pruner: AdaptivePruner, args: APTConfig) -> str:
    """What a cut before the first step takes off the estimate, which is for the model before it."""
    if not args.prunes_before:
        return ""
    cut = evenly_cut(pruner, args.target_sparsity or 0.0)
    fewer = pruner.block_cost.total(pruner.plan.counts) - pruner.block_cost.total(cut.counts)
    freed = int(fewer * next(pruner.model.parameters()).element_size())
    told = f" of {_before_the_cut(pruner)}; the cut before it frees about {format_bytes(freed)} of weights"
    if args.base_quantization is not None:
        plain, quantised = base_bytes(pruner, cut, args.base_quantization)
        told += (
            f", {args.base_quantization} then about {format_bytes(plain - quantised)} more (linear layers of the "
            f"blocks: {format_bytes(quantised)} for {format_bytes(plain)})"
        )
    return told


def base_bytes(pruner: AdaptivePruner, plan: PruningPlan, form: str) -> tuple[int, int]:
    """Of the linear layers of the blocks at ``plan``: plain, and as ``base_quantization`` makes them."""
    model, family = pruner.origin.dense, pruner.family
    linear = {f"{path.removesuffix('.base_layer')}.weight" for path, _ in base_linears(model, family)}

    def total(bytes_of: Callable[[nn.Parameter], float]) -> int:
        cost = parameter_cost(model, family, pruner.spaces, lambda name, p: bytes_of(p) if name in linear else 0.0)
        return int(cost.total(plan.counts))

    return total(lambda p: p.element_size()), total(lambda p: BYTES[form])


def _before_the_cut(pruner: AdaptivePruner) -> str:
    return "the model as given" if pruner.origin.is_pruned else "the dense model"


def tune_phases(args: APTConfig) -> list[str]:
    """What trains, phase by phase."""
    phases = [args.tune]
    pruned = "ranks have grown" if args.prunes_before else "pruning"
    for mode, when in ((args.tune_after_pruning, pruned), (args.tune_after_distillation, "distillation")):
        if mode is not None and mode != phases[-1].split(" ")[0]:
            phases.append(f"{mode} (after {when})")
    return phases


def memory_estimate(model: PreTrainedModel, args: APTConfig, length: int, predicted: int) -> int:
    """Bytes of the first training step: weights, gradients and Adam moments of what trains, activations and logits.

    Activations are counted as 16 values per token and hidden dimension and 3 per token and neuron in each layer
    (stored for the backward pass), plus attention probabilities; gradient checkpointing keeps one value per layer.
    A model that predicts words has one logit per word and predicted token, kept as it was computed, beside it its
    log-probability and the gradients of both in float32. A teacher is not counted.

    Args:
        model: With adapters; may be on the meta device.
        args: Batch size, precision and checkpointing.
        length: Tokens per input.
        predicted: Tokens per row that a language model predicts.
    """
    family, origin = family_of(model.config), starting_point(model)
    counts = origin.plan.counts
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    tokens = args.train_batch_size * length
    hidden, layers = counts[HIDDEN], len(family.layer_paths(model))
    per_layer = 16 * hidden
    per_layer += sum(3 * counts[s.name] for s in origin.spaces if s.kind == "neurons") // layers
    per_layer += sum(2 * counts[s.name] * length for s in origin.spaces if s.kind == "heads") // layers
    if args.gradient_checkpointing:
        per_layer = hidden + per_layer // layers
    element = 2 if args.bf16 or args.fp16 else 4
    logits = args.train_batch_size * predicted * _vocabulary(model) * (element + _FLOAT32_PER_LOGIT * 4)
    activations = tokens * per_layer * layers * family.repeats(model.config) * element
    return weights + trained * (4 + _ADAM_BYTES) + activations + logits


def _vocabulary(model: nn.Module) -> int:
    """Words that ``model`` chooses among for each token; 0 for another kind of prediction."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    return 0 if head is None else len(head.weight)


def _counted(model: nn.Module, args: APTConfig) -> str:
    """What :func:`memory_estimate` is made of, for people."""
    parts = ["weights", "gradients", "optimizer", "activations"]
    if _vocabulary(model):
        parts.append(f"logits over {_vocabulary(model):,} words with log-probabilities and gradients")
    return ", ".join(parts) + ("" if args.distillation == "none" else "; without the teacher")


def _trained(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def _space_table(pruner: AdaptivePruner) -> str:
    rows: list[Mapping[str, Any]] = []
    for kind in ("heads", "neurons", "experts", HIDDEN):
        members = [space for space in pruner.spaces if space.kind == kind]
        if not members:
            continue
        sizes = [pruner.plan.counts[space.name] for space in members]
        left = next((space for space in members if pruner.plan.counts[space.name]), members[0])
        unit = pruner.block_cost.marginal(left.name, pruner.plan.counts)
        rows.append(
            {
                "kind": kind,
                "units": _sizes(sizes)
                + (f" of {_sizes([s.size for s in members])}" if pruner.origin.is_pruned else ""),
                "unit": f"{unit:,.0f}",
                "pruned": _pruned(pruner, kind),
                "step": pruner.budget.limits.round_to[kind],
            }
        )
    columns = [
        ("kind", "kind"),
        ("units", "units"),
        ("unit", "parameters each"),
        ("pruned", "pruned"),
        ("step", "multiple of"),
    ]
    return markdown_table(rows, [(key, header, None) for key, header in columns])


def _shape_lines(pruner: AdaptivePruner, schedule: Schedule) -> list[str]:
    """What equal layers keep at the end, and the units that free ones would keep within the same budget."""
    if pruner.budget.shape is None:
        return []
    plans = [evenly_cut(pruner, schedule.target_sparsity, free=free).counts for free in (False, True)]
    layers = sum(any(plans[0][name] for name in layer.spaces) for layer in pruner.budget.shape.layers)
    kept, beside = [], []
    for kind, name in (("heads", "heads"), ("neurons", "neurons"), (HIDDEN, "hidden dimensions")):
        members = [space for space in pruner.spaces if space.kind == kind]
        equal, free = (sum(counts[space.name] for space in members) for counts in plans)
        most = max(plans[0][space.name] for space in members)
        kept.append(f"{most:,} of {max(space.size for space in members):,} {name}")
        beside.append(f"{equal:,} {name} (free: {free:,})")
    return [
        f"shape        uniform, a stock checkpoint of {layers} of {len(pruner.budget.shape.layers)} layers; about "
        f"{kept[0]} and {kept[1]} in each, {kept[2]}",
        f"             kept in all about {', '.join(beside)}",
        "",
    ]


def _sizes(sizes: Sequence[int]) -> str:
    """Units per sublayer, or where they differ, of all: "12 × 64", "31 (0 to 4)"."""
    if len(sizes) < 3:
        return " + ".join(map(str, sizes))
    if len(set(sizes)) == 1:
        return f"{len(sizes)} × {sizes[0]}"
    return f"{sum(sizes)} ({min(sizes)} to {max(sizes)})"


def _pruned(pruner: AdaptivePruner, kind: str) -> str:
    if not pruner.settings.prunes or kind not in pruner.budget.limits.kinds:
        return "no"
    return "yes" if kind in pruner.budget.limits.targets else "as a whole"


def _schedule_lines(pruner: AdaptivePruner, schedule: Schedule, args: APTConfig) -> list[str]:
    if not schedule.events:
        return ["Nothing is pruned (target_sparsity: null)."]
    at_first = pruner.plan
    length = pruner.family.tokens(pruner.origin.dense.config) or args.reference_length
    flops = flops_cost(pruner.origin.dense, pruner.family, pruner.spaces, 1, length)
    adapters = lora.adapter_parameters(pruner.model)
    rows = [
        {
            "step": 0,
            **_removed(pruner, pruner.sparsity()),
            "params": format_count(pruner.block_cost.total(at_first.counts)),
            "flops": format_count(flops.total(at_first.counts)),
            "adapters": format_count(adapters),
        }
    ]
    if schedule.before:
        cut = evenly_cut(pruner, schedule.target_sparsity)
        rows.append(
            {
                "step": "0, cut",
                **_removed(pruner, schedule.target_sparsity),
                "params": format_count(pruner.block_cost.total(cut.counts)),
                "flops": format_count(flops.total(cut.counts)),
                "adapters": f"≤ {format_count(adapters)}",
            }
        )
    for number, step in enumerate(schedule.events):
        sparsity = schedule.sparsity(number, pruner.sparsity())
        even = evenly_cut(pruner, sparsity)
        growth = 1 + schedule.tuning_share(number) * (args.tuning_growth - 1) if args.rank_growth != "none" else 1
        rows.append(
            {
                "step": step,
                **_removed(pruner, sparsity),
                "params": format_count(pruner.block_cost.total(even.counts)),
                "flops": format_count(flops.total(even.counts)),
                "adapters": f"≤ {format_count(adapters * growth)}",
            }
        )
    columns = [
        ("step", "step"),
        ("target", f"{args.sparsity_metric} removed"),
        *([("of_start", "of this model")] if pruner.origin.is_pruned else []),
        ("params", "block parameters"),
        ("flops", f"block FLOPs at 1×{length}"),
        ("adapters", "adapter parameters"),
    ]
    then = f"masks fade over {schedule.window} steps."
    if schedule.before:
        scored = f"{_before_the_cut(pruner)} is {_scoring(pruner, args)}"
        then = f"{scored}cut before the first step, after which only ranks grow."
    elif pruner.scores_at_cuts:
        then = f"at each event the model is {_scoring(pruner, args)}cut; with fewer sublayers left, passes are fewer."
    fewer = fewer_events(args, schedule)
    lines = [
        markdown_table(rows, [(key, header, None) for key, header in columns]),
        "",
        *([] if fewer is None else [fewer]),
        f"Parameters and FLOPs assume that every kind loses the same share; {then}",
    ]
    if schedule.distillation_end > schedule.distillation_start:
        lines.append(
            f"Distillation ({args.distillation}) from step {schedule.distillation_start} "
            f"to {schedule.distillation_end}."
        )
    return lines


def _removed(pruner: AdaptivePruner, sparsity: float) -> dict[str, str]:
    """``sparsity`` of the dense original, and what that is of the model as given."""
    of_start = 1 - (1 - sparsity) / (1 - pruner.sparsity())
    return {name: f"{share:.1%}" if share else "0 %" for name, share in (("target", sparsity), ("of_start", of_start))}


def _scoring(pruner: AdaptivePruner, args: APTConfig) -> str:
    """What is done to the model before it is cut."""
    scored = pruner.importance.describe(args.calibration_samples)
    return f"{scored} and " if scored else ""


def evenly_cut(pruner: AdaptivePruner, sparsity: float, free: bool = False) -> PruningPlan:
    """A plan at ``sparsity`` in which every kind loses about the same share; ``free``: of whatever shape."""
    scores = {name: torch.linspace(1, 0, number, dtype=torch.float64) for name, number in pruner.plan.counts.items()}
    return pruner.budget.choose(scores, pruner.plan, sparsity, densities=True, free=free)
