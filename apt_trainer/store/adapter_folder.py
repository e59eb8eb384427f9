"""A pruned model as what sets it apart from its dense base: the plan, the adapters before they were merged, and the
weights that were changed otherwise, such as the task head.

Loading cuts the base, merges the adapters and puts the other weights in place, which gives the weights of the whole
model again. The base must be the same: its weights are known by their hash. Not for whole models (``saved_model``).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import CONFIG_NAME

from apt_trainer.errors import Retold, UserError, reason
from apt_trainer.models import family_of
from apt_trainer.models.family import POST_NORM_POLICY
from apt_trainer.models.modeling_apt import REMOTE_CODE
from apt_trainer.plan.pruning_plan import PLAN_FILE, PruningPlan
from apt_trainer.store.claims import PACKED, check_counts, check_needed, numbers_of
from apt_trainer.store.events import read_json, read_json_object, write_json
from apt_trainer.store.saved_model import DIFFERENCE, as_pruned, dense_shape
from apt_trainer.store.stock import DENSE_SIZES, with_dense_sizes
from apt_trainer.surgery.adapters import merge_state
from apt_trainer.surgery.cutting import apply_plan

ADAPTERS_FILE = "apt_adapters.safetensors"
"""Beside a whole model: the adapters that were merged into it."""
WEIGHTS_FILE = "apt_difference.safetensors"
"""Of a folder without the whole model: adapters, and other weights."""
_ADAPTER, _WEIGHT = "adapter/", "weight/"


def save_adapters(adapters: Mapping[str, Tensor], model: PreTrainedModel, folder: Path) -> None:
    """Write what was merged into ``model`` beside it."""
    name = str(model.config._name_or_path)
    base = os.path.abspath(name) if os.path.exists(name) else name
    metadata = {"base": base, "revision": getattr(model.config, "_commit_hash", None) or ""}
    save_file(dict(adapters), folder / ADAPTERS_FILE, metadata=metadata)


@torch.no_grad()
def write_difference(model: PreTrainedModel, source: Path, folder: Path) -> dict[str, Any]:
    """Write what sets ``model``, loaded from ``source``, apart from its base to ``folder``.

    Returns {"base", "bytes_of_adapters", "bytes_in_full"}. Raises :class:`UserError` where ``source`` holds no
    adapters, or their base is not at hand.
    """
    if not (source / ADAPTERS_FILE).is_file():
        raise UserError(
            f"{source} holds no {ADAPTERS_FILE}. Train with keep_adapters: true, or export the whole model instead."
        )
    adapters, metadata = _read(source / ADAPTERS_FILE)
    plan = PruningPlan.from_json(read_json(source / PLAN_FILE))
    dtype = _dtype(model.config if model.config.dtype is None else read_json_object(source / CONFIG_NAME))
    base, revision = metadata.get("base", ""), metadata.get("revision") or None
    own = _config_of_base(base, revision, source)
    built, digest = _built(base, revision, own, model.config, dtype, source)
    _change(built, plan, adapters, source)
    same = dict(built.named_parameters())
    changed = {
        name: value.to(dtype).contiguous()
        for name, value in model.named_parameters()
        if name not in same or not _is_close(value.to(dtype), same[name])
    }
    folder.mkdir(parents=True, exist_ok=True)
    kept = {f"{_ADAPTER}{name}": value for name, value in adapters.items()}
    kept |= {f"{_WEIGHT}{name}": value for name, value in changed.items()}
    save_file(kept, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    described = model.config.to_dict() | {"dtype": str(dtype).removeprefix("torch.")}
    for name in ("auto_map", "apt_code_sha256"):
        described.pop(name, None)
    write_json(folder / CONFIG_NAME, described)
    write_json(folder / PLAN_FILE, plan.to_json())
    write_json(folder / DIFFERENCE, {"format_version": 1, "base": base, "revision": revision, "sha256": digest})
    sizes = {"bytes_of_adapters": _bytes(adapters.values()), "bytes_in_full": _bytes(changed.values())}
    return {"base": base, **sizes}


@torch.no_grad()
def load_difference(folder: Path, base: str | Path | None = None, dtype: Any = "auto", **options: Any) -> Any:
    """The model whose difference from its base is in ``folder``.

    Args:
        folder: what :func:`write_difference` made.
        base: where the base is now; default: where it was.
        dtype: of the result; default: that of the whole model.
        options: for loading the base, such as ``attn_implementation`` or ``token``.

    Raises:
        UserError: the folder is damaged, or the base is missing or is another.
    """
    record = read_json_object(folder / DIFFERENCE)
    named = {name: record.get(name) for name in ("base", "sha256")}
    if record.get("format_version") != 1 or not all(isinstance(value, str) for value in named.values()):
        raise UserError(f"{folder / DIFFERENCE} is damaged, or was written by another version of apt_trainer.")
    described = read_json_object(folder / CONFIG_NAME)
    tensors, _ = _read(folder / WEIGHTS_FILE)
    revision = record.get("revision") if base is None else None
    name = str(base or named["base"])
    own = _config_of_base(name, revision, folder)
    for sizes in (described, described.get(DENSE_SIZES)):
        layers = max(value for key, value in own.to_dict().items() if key.endswith(("layers", "layer")) and value)
        check_counts(folder, sizes if isinstance(sizes, dict) else {}, layers)

    def retell(error: Exception) -> Exception:
        return UserError(f"The config in {folder} is damaged ({reason(error)}).")

    with Retold(retell):
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    model, digest = _built(name, revision, own, config, _dtype(described), folder, **options)
    if digest != named["sha256"]:
        raise UserError(
            f"{base or named['base']} is not the model that {folder} was made from: its weights differ. Give that "
            "one: load_pruned(folder, base=PATH)."
        )
    plan = PruningPlan.from_json(read_json(folder / PLAN_FILE))
    _change(model, plan, _part(tensors, _ADAPTER), folder)
    parameters = dict(model.named_parameters())
    for name, value in _part(tensors, _WEIGHT).items():
        if name not in parameters or parameters[name].shape != value.shape:
            raise UserError(f"{folder} is damaged: its {name} does not fit the model.")
        parameters[name].copy_(value)
    return model if dtype in (None, "auto") else model.to(getattr(torch, str(dtype).removeprefix("torch.")))


def _config_of_base(base: str, revision: str | None, folder: Path) -> Any:
    """Raises :class:`UserError` where ``base`` is not at hand, or was pruned before."""
    with Retold(lambda error: _no_base(folder, base, revision, error)):
        own = transformers.AutoConfig.from_pretrained(base, revision=revision, trust_remote_code=False)
        if hasattr(own, "apt_structure"):
            raise ValueError("it was pruned before, and differences are kept from a dense model only")
    return own


def _no_base(folder: Path, base: str, revision: str | None, error: Exception) -> UserError:
    return UserError(
        f"{folder} needs its base {base}{f' ({revision})' if revision else ''}, which could not be loaded "
        f"({reason(error)}). Give it: load_pruned(folder, base=PATH)."
    )


def _built(
    base: str, revision: str | None, own: Any, config: Any, dtype: torch.dtype, folder: Path, **options: Any
) -> tuple[PreTrainedModel, str]:
    """(the dense base, whose config is ``own``, with the head of ``config``; hash of the weights that it has)"""
    with Retold(lambda error: UserError(f"{folder} is damaged: its config is that of no model ({reason(error)}).")):
        cls, stock = dense_shape(with_dense_sizes(config))
        cls = cls or getattr(transformers, (config.architectures or [""])[0])
        check_needed(folder, numbers_of(folder, cls, stock), PACKED * numbers_of(Path(base), cls, own))
    if hasattr(config, POST_NORM_POLICY):
        setattr(stock, POST_NORM_POLICY, getattr(config, POST_NORM_POLICY))
    options |= {"dtype": dtype, "ignore_mismatched_sizes": True, "output_loading_info": True, "revision": revision}
    with Retold(lambda error: _no_base(folder, base, revision, error)):
        model, info = cls.from_pretrained(base, config=stock, **options)
    new = {*info["missing_keys"], *(key[0] for key in info["mismatched_keys"])}
    return model.eval(), _hash(model, new)


def _change(model: PreTrainedModel, plan: PruningPlan, adapters: Mapping[str, Tensor], folder: Path) -> None:
    """Cut ``model`` to ``plan``, merge ``adapters`` and give it the class and config of the whole model."""
    family = family_of(model.config)
    spaces = family.spaces(model)
    dense = PruningPlan.dense(spaces)
    plan.check_within(dense)
    apply_plan(model, family, spaces, dense, plan)
    merge_state(model, adapters)
    as_pruned(model, family, plan, getattr(model.config, REMOTE_CODE, True))


def _hash(model: nn.Module, new: set[str]) -> str:
    """SHA-256 of the weights of ``model``, those that are ``new`` left out."""
    found = hashlib.sha256()
    for name, value in model.named_parameters():
        if name not in new:
            found.update(f"{name} {list(value.shape)} {value.dtype}".encode())
            found.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return found.hexdigest()


def _is_close(one: Tensor, other: Tensor) -> bool:
    """Whether two weights are equal but for the order in which a device has added."""
    if one.shape != other.shape:
        return False
    step = torch.finfo(one.dtype).eps * float(one.abs().max())
    return float((one.float() - other.float()).abs().max()) <= step


def _dtype(described: Any) -> torch.dtype:
    """The type of weights that a config, or what is read from its file, tells."""
    found = described.get("dtype") if isinstance(described, dict) else described.dtype
    dtype = getattr(torch, str(found or "float32").removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype):
        raise UserError(f"The config has dtype={found!r}, which is no type of weights.")
    return dtype


def _read(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(file, framework="pt") as tensors:
            metadata = tensors.metadata() or {}
        return load_file(file), metadata
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file} is missing or damaged ({reason(error)}).") from error


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(value.numel() * value.element_size() for value in tensors)
