"""A transformer inside of the model that a Trainer has: a module of the user's own, or a ``SentenceTransformer``.

It is the transformer that is scored, cut and given adapters; what is round it trains as it is. Its parameters go by
their names in the whole model wherever an optimizer or a checkpoint names them.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftMixedModel, PeftModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from apt_trainer.distillation.teacher import hidden_width
from apt_trainer.errors import UserError
from apt_trainer.plan.pruning_plan import PruningPlan
from apt_trainer.settings.engines import wants_deepspeed
from apt_trainer.settings.fsdp import wants_fsdp
from apt_trainer.store.events import write_json
from apt_trainer.store.rescue import PLAN_FILE, rescuing
from apt_trainer.store.saved_model import load_pruned
from apt_trainer.store.saving import STAGING, move_in, save_pruned

OUTSIDE_FILE = "outside.safetensors"
"""Weights of what is round the transformer."""
_ITSELF = (PreTrainedModel, PeftModel, PeftMixedModel, nn.DataParallel, nn.parallel.DistributedDataParallel)


def place_of_transformer(model: Any) -> str:
    """Path of the transformer in ``model``; "" where that is ``model`` itself, or there is none.

    Raises:
        UserError: there are several.
    """
    if isinstance(model, _ITSELF) or not isinstance(model, nn.Module) or hasattr(model, "_orig_mod"):
        return ""
    found: list[str] = []
    for path, module in model.named_modules():
        if isinstance(module, PreTrainedModel) and not any(path.startswith(f"{other}.") for other in found):
            found.append(path)
    if len(found) > 1:
        raise UserError(
            f"{type(model).__name__} holds {len(found)} transformers ({', '.join(found)}), but one is pruned. Give a "
            "model with one."
        )
    return found[0] if found else ""


def unwrap_in_losses(losses: Any, model: nn.Module) -> None:
    """Where modules of ``losses``, one or several by name, run a wrapper of an engine round ``model``, let them run
    ``model`` itself. sentence-transformers puts the wrapper there, and once it is there no other one: after a change
    of shape processes would go on without averaging their gradients."""
    for loss in losses.values() if isinstance(losses, Mapping) else (losses,):
        for module in list(loss.modules()) if isinstance(loss, nn.Module) else ():
            for name, child in list(module.named_children()):
                if getattr(child, "module", None) is model:
                    setattr(module, name, model)


def check_inside(model: nn.Module, place: str, args: Any) -> None:
    """Raise :class:`UserError` for what does not go with a transformer that is inside of ``model``, at ``place``."""
    if not place:
        return
    where = f"The transformer is inside of {type(model).__name__}, at {place!r}"
    inner = model.get_submodule(place)
    if args.prunes and "hidden" in args.prune_targets and inner.base_model is inner:  # type: ignore[union-attr]
        raise UserError(
            f"{where}, and what is round it reads its hidden states, so their number has to stay. Set prune_targets: "
            "[heads, neurons]."
        )
    if wants_deepspeed(args) or wants_fsdp(args):
        raise UserError(
            f"{where}, which DeepSpeed and FSDP are not supported with. Train in one process or under DDP."
        )


def what_is_compared(model: nn.Module, place: str, args: Any) -> str | None:
    """What of a transformer inside of ``model``, at ``place``, is not compared with a teacher's; None: nothing is left
    out."""
    if not place or args.distillation == "none" or not args.layer_weight or args.distillation_layer_map == "none":
        return None
    inner: Any = model.get_submodule(place)
    compared = "embeddings" if inner.base_model is inner else "predictions"
    return (
        f"The transformer is inside of {type(model).__name__}: its {compared} are compared with the teacher's, its "
        "layers are not (layer_weight)."
    )


def check_embeddings(model: nn.Module, teacher: nn.Module, args: Any) -> None:
    """Raise :class:`UserError` where ``model`` has no logits, so that its hidden states are compared with those of a
    ``teacher``, and these are of another width, or will be."""
    if model.base_model is not model:
        return
    ours, theirs = hidden_width(model), hidden_width(teacher)
    if ours != theirs:
        raise UserError(
            f"The teacher has {theirs} hidden dimensions and the model {ours}, but without logits they are compared "
            "by their embeddings. Give a teacher of equal width, or set distillation: self."
        )
    if args.prunes and "hidden" in args.prune_targets:
        raise UserError(
            "prune_targets has hidden, but without logits the model is compared with its teacher by its embeddings, "
            "whose width has to stay. Set prune_targets: [heads, neurons], or distillation: self."
        )


@contextmanager
def watched_forward(
    transformer: nn.Module, before: Callable[..., Any], after: Callable[..., Any] | None = None
) -> Iterator[None]:
    """Within it, each pass of ``transformer`` is seen as by hooks: ``before`` (module, args, kwargs) may give other
    arguments, ``after`` (module, args, outputs) other outputs. Its ``forward`` is replaced, since what is round it may
    call that by itself, as sentence-transformers does, and then no hook is called.
    """
    own = transformer.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = before(transformer, args, kwargs) or (args, kwargs)
        outputs = own(*args, **kwargs)
        other = None if after is None else after(transformer, args, outputs)
        return outputs if other is None else other

    with replaced(transformer, forward=forward):
        yield


def pooling_of(model: nn.Module, place: str) -> Callable[[torch.Tensor, Mapping[str, Any]], torch.Tensor] | None:
    """What ``model``, of sentence-transformers, makes of the hidden states of the transformer at ``place``: from them
    [B, S, d] and the inputs of their pass to [B, d]. None where it has no module that pools them."""
    pools = [child for child in model.children() if hasattr(child, "pooling_mode")] if place else []
    if not pools:
        return None

    def pool(hidden: torch.Tensor, inputs: Mapping[str, Any]) -> torch.Tensor:
        pooled: torch.Tensor = pools[0]({**inputs, "token_embeddings": hidden})["sentence_embedding"]
        return pooled

    return pool


def save_around(
    model: Any, place: str, path: Path, plan: PruningPlan, tokenizer: Any, start: PruningPlan | None = None
) -> None:
    """Write a finished ``model`` with a cut transformer at ``place`` to ``path``; ``start``: the plan it began with.

    One that has ``save_pretrained`` writes itself. Of others the transformer is written as any pruned model, and the
    weights of the rest beside it, for :func:`load_pruned_into`.
    """
    inner = model.get_submodule(place)
    if not hasattr(model, "save_pretrained"):
        save_pruned(inner, path, plan, tokenizer, start)
        outside = {n: v.detach().cpu().contiguous() for n, v in model.state_dict().items() if _is_outside(n, place)}
        unfinished = path / f".{OUTSIDE_FILE}.tmp"
        save_file(outside, unfinished, metadata={"format": "pt"})
        unfinished.replace(path / OUTSIDE_FILE)
        return
    with rescuing(inner, path, plan):
        path.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=STAGING, dir=path))
        try:
            model.save_pretrained(str(staging))
            write_json(staging / PLAN_FILE, plan.to_json())
            move_in(staging, path)
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def load_pruned_into(model: nn.Module, path: str | Path) -> nn.Module:
    """Give ``model``, made as the dense one was, the pruned transformer and all other weights that a run saved in
    ``path``; returns it.

    Raises:
        UserError: the weights do not fit ``model``.
    """
    place, folder = place_of_transformer(model), Path(path)
    if not place or not (folder / OUTSIDE_FILE).is_file():
        raise UserError(f"{path} holds no model with a transformer inside, or {type(model).__name__} has none.")
    model.set_submodule(place, load_pruned(folder))
    missing, unexpected = model.load_state_dict(load_file(folder / OUTSIDE_FILE), strict=False)
    missing = [name for name in missing if _is_outside(name, place)]
    if missing or unexpected:
        raise UserError(f"{folder / OUTSIDE_FILE} does not fit: missing {missing}, unexpected {unexpected}.")
    return model


def _is_outside(name: str, place: str) -> bool:
    return not name.startswith(f"{place}.")


def without_own_groups(options: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """Options of an optimizer without the groups of parameters that a Trainer made of a loss with ``model`` in it.

    Raises:
        UserError: the loss has parameters of its own.
    """
    held = {id(parameter) for parameter in model.parameters()}
    groups = options.get("optimizer_dict", [])
    if any(id(parameter) not in held for group in groups for parameter in group["params"]):
        raise UserError(
            "The loss has parameters of its own, which no change of shape carries over. Take a loss without, for "
            "example CosineSimilarityLoss or MultipleNegativesRankingLoss."
        )
    return {name: value for name, value in options.items() if name != "optimizer_dict"}


@contextmanager
def replaced(owner: Any, **methods: Callable[..., Any]) -> Iterator[None]:
    """Within it, ``owner`` has ``methods`` instead of those of its class."""
    before = {name: owner.__dict__[name] for name in methods if name in owner.__dict__}
    owner.__dict__.update(methods)
    try:
        yield
    finally:
        for name in methods:
            owner.__dict__.pop(name, None)
        owner.__dict__.update(before)
