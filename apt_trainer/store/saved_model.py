"""What a finished model is saved as, and how it loads: stock modelling code, other sizes, equal logits.

The classes of the format are those of ``modeling_apt``; here a cut model becomes one of them, older formats are read,
and the Auto classes learn them. A stock loader does not know the model type and fails loudly instead of filling
missing weights at random. ``apt_kept`` tells which units of the dense model are left (``PruningPlan.packed``), for
who prunes further. With ``apt_plan`` the layers run by an execution plan (``models.execution``); the rest of the
config is then still that of the layers, one after the other. ``apt_post_norm_policy``, where it is not the default,
says which no-ops those of gone sublayers are to be (``models.family``). Not for checkpoints inside a run
(``training.checkpoints``).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from safetensors import SafetensorError
from torch import nn
from wrapt import LazyObjectProxy

from apt_trainer.errors import Retold, UserError, reason
from apt_trainer.libraries.private_names import check_names
from apt_trainer.models import FAMILIES, HIDDEN, Head, ModelFamily, family_of, modeling_apt
from apt_trainer.models.base import exists
from apt_trainer.models.modeling_apt import (
    DENSE,
    PREFIX,
    REMOTE_CODE,
    STUB_KINDS,
    WEIGHTS,
    ConfigView,
    config_class,
    get_size,
    model_class,
    stock_classes,
)
from apt_trainer.plan.pruning_plan import PruningPlan
from apt_trainer.settings.execution_plan import Plan, plan_from_json
from apt_trainer.store.claims import OF_DENSE, check_folder, check_sizes
from apt_trainer.store.stock import DENSE_SIZES, become_stock, with_dense_sizes

if TYPE_CHECKING:  # this module is imported as soon as AutoConfig is, which must not wait for modelling code
    from transformers import PreTrainedConfig, PreTrainedModel

KEPT = "apt_kept"
DIFFERENCE = "apt_base.json"
"""File of a folder that holds no whole model but what sets one apart from its base (``adapter_folder``)."""
_SIZES = ("in_features", "out_features", "out_channels", "embedding_dim", "normalized_shape", "nf", "nx")
OF_HUB = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
"""Arguments of ``from_pretrained`` that say where files are, whatever they hold."""

Structure = dict[str, Any]


def describe_structure(model: nn.Module, dense: nn.Module, family: ModelFamily, plan: PruningPlan) -> Structure:
    """What sets the base of ``model`` apart from that of ``dense`` (which may be on the meta device); ``modeling_apt``
    says in which form."""
    structure: Structure = {"replaced": {}, "parameters": {}, "attributes": {}, "hidden": None}
    head = family.head(model)
    of_head = {*head.reads, *head.writes, *head.norms}
    for path, module in model.named_modules():
        if type(module) in STUB_KINDS:
            structure["replaced"][path] = STUB_KINDS[type(module)]
            continue
        if path in of_head:
            continue
        original = dense.get_submodule(path)
        for name, parameter in module.named_parameters(recurse=False):
            before = getattr(original, name).shape
            if parameter.shape != before:
                kept = [None if new == old else new for new, old in zip(parameter.shape, before, strict=True)]
                structure["parameters"][f"{path}.{name}"] = kept
        for name in _SIZES:
            if getattr(module, name, None) != getattr(original, name, None):
                value = getattr(module, name)
                structure["attributes"].setdefault(path, {})[name] = list(value) if isinstance(value, tuple) else value
    for space in family.spaces(dense):
        for path, name, value in space.sizes(plan.kept[space.name]):
            if exists(model, path) and get_size(dense.get_submodule(path), name) != value:
                kept_units = list(value) if isinstance(value, tuple) else value
                structure["attributes"].setdefault(path, {})[name] = kept_units
        if space.name == HIDDEN and len(plan.kept[HIDDEN]) < space.size:
            structure["hidden"] = _hidden(family, len(plan.kept[HIDDEN]), family.described_heads(dense))
    return structure


def _hidden(family: ModelFamily, size: int, heads: Mapping[str, Head]) -> dict[str, Any]:
    """What a head of any kind has to know where hidden dimensions were cut to ``size``."""
    sides = {ending: _sides(head) for ending, head in heads.items()}
    return {"size": size, "reads": list(family.base_reads), "heads": sides}


def _sides(head: Head) -> dict[str, list[str]]:
    sides = {"reads": head.reads, "writes": head.writes, "norms": head.norms}
    return {name: list(paths) for name, paths in sides.items() if paths}


def _from_older_format(structure: Mapping[str, Any], architecture: str, family: ModelFamily) -> Structure:
    """A structure without "hidden", as formats 1 and 2 have it: with the head that was saved, and shapes in full."""
    parts: Structure = {name: dict(structure[name]) for name in ("replaced", "parameters", "attributes")}
    widths = [
        sizes["embedding_dim"]
        for path, sizes in parts["attributes"].items()
        if path.endswith(family.embeddings[0]) and "embedding_dim" in sizes
    ]
    head = next((head for ending, head in family.heads.items() if architecture.endswith(ending)), Head())
    for path in (*head.reads, *head.writes, *head.norms):
        parts["attributes"].pop(path, None)
        for name in ("weight", "bias"):
            parts["parameters"].pop(f"{path}.{name}", None)
    for name, shape in parts["parameters"].items():
        if name.removesuffix(".weight").endswith(family.embeddings):
            parts["parameters"][name] = [None, *shape[1:]]
    return parts | {"hidden": _hidden(family, widths[0], family.heads) if widths else None}


def _complete(config: Any) -> None:
    """Called with every config of the format: checks it, reads older formats and lets the Auto classes know it."""
    family = FAMILIES[config.apt_base_model_type]
    family.keeps_norms(config)
    structure = config.apt_structure
    if structure is None:
        return
    check_names("loading")
    if "hidden" not in structure:
        config.apt_structure = _from_older_format(structure, config.apt_base_architecture, family)
    _announce(config.apt_base_model_type)


def put_saved_plan(model: PreTrainedModel, plan: Plan) -> None:
    """Let ``model``, whose class is of this format, run by ``plan`` and say so when it is saved."""
    from apt_trainer.models.execution import put_plan

    setattr(model.config, DENSE, put_plan(model, plan))


def _put_plan_of_config(model: PreTrainedModel) -> None:
    config: Any = model.config
    put_saved_plan(model, plan_from_json(config.apt_plan, config.apt_base_model_type, config.num_hidden_layers))


modeling_apt.HOOKS.update(config=_complete, plan=_put_plan_of_config)


@cache
def _announce(model_type: str) -> None:
    """Register the classes of ``model_type`` with every Auto class that serves the stock ones."""
    own: Any = config_class(model_type)
    stock = own.__mro__[1]
    transformers.AutoConfig.register(PREFIX + model_type, own, exist_ok=True)
    for name, classes in stock_classes(stock).items():
        ours = tuple(model_class(cls.__name__) for cls in classes)
        auto = getattr(transformers, name)
        auto._model_mapping.register(own, ours if len(ours) > 1 else ours[0], exist_ok=True)
    tokenizer = transformers.TOKENIZER_MAPPING.get(stock, None)
    if tokenizer is not None:
        transformers.TOKENIZER_MAPPING.register(own, tokenizer, exist_ok=True)


def register(configs: Any) -> None:
    """Make AutoConfig, and with it every Auto class, recognise pruned models of every family.

    ``configs`` is transformers' CONFIG_MAPPING. Modules that import it may be half imported, so that a class is made
    only when its model type is met.
    """
    for model_type in FAMILIES:
        configs.register(
            PREFIX + model_type, LazyObjectProxy(partial(config_class, model_type), interface=Callable), exist_ok=True
        )


def as_pruned(model: PreTrainedModel, family: ModelFamily, plan: PruningPlan, remote_code: bool = True) -> None:
    """Turn a cut model, in place, into the class that saves and loads with its structure.

    A stock model whose shapes are those of the dense one stays a stock model, and one whose layers are all cut alike
    becomes a stock model of a smaller config where that can say so (``stock``). ``remote_code``: other saves carry the
    code that loads them where this package is not installed.
    """
    model.config.dtype = model.dtype  # a save leaves its name
    dense = _shape_of(model, model.config, "meta")
    structure = describe_structure(model, dense, family, plan)
    if hasattr(model.config, "apt_structure"):
        model.config.describe(model.config.apt_base_architecture, structure)
    elif any(structure.values()) and not become_stock(model, family, plan):
        become_own(model, structure)
    else:
        return
    setattr(model.config, KEPT, plan.packed(family.spaces(dense)))
    if not remote_code:
        setattr(model.config, REMOTE_CODE, False)


def become_own(model: PreTrainedModel, structure: Structure, plan: Mapping[str, Any] | None = None) -> None:
    """Give the stock ``model``, in place, the class and config of this format."""
    stock = type(model)
    shared, model_type = model.config, model.config.model_type
    config = copy.deepcopy(shared)  # not made anew: some configs read their own values differently the second time
    config.__class__ = config_class(model_type)
    vars(config).pop(DENSE_SIZES, None)  # of what its dense model was cut from
    config.describe(stock.__name__, structure, plan)
    model.__class__ = model_class(stock.__name__)
    for module in model.modules():
        own = getattr(module, "config", None)
        if own is shared:
            module.config = config
        elif isinstance(own, ConfigView) and own.shared is shared:
            own.shared = config


def dense_shape(config: PreTrainedConfig) -> tuple[type[PreTrainedModel] | None, PreTrainedConfig]:
    """(class, config) of the dense model that a pruned one was cut from; (None, a copy) for a stock config."""
    architecture = getattr(config, "apt_base_architecture", None)
    if architecture is None:
        return None, copy.deepcopy(config)
    cls = getattr(transformers, architecture)
    values = config.to_dict()
    for name in ("model_type", "auto_map", WEIGHTS):
        values.pop(name, None)
    values["architectures"] = [architecture]
    stock = cls.config_class(**{name: value for name, value in values.items() if not name.startswith("apt_")})
    stock._attn_implementation = config._attn_implementation
    return cls, stock


def dense_copy(model: PreTrainedModel, device: torch.device | str | None = None) -> PreTrainedModel:
    """A model of the stock class and size that ``model`` was cut from, with random weights: for sizes and speed.

    It is made on ``device`` at once, by default that of ``model``; "meta" is enough to count.
    """
    return _shape_of(model, with_dense_sizes(model.config), device)


def _shape_of(
    model: PreTrainedModel, config: PreTrainedConfig, device: torch.device | str | None = None
) -> PreTrainedModel:
    """What the dense model of ``config`` is on ``device``, of the class and type of weights of ``model``."""
    cls, config = dense_shape(config)
    config.dtype = model.dtype  # in what a config is saved as it is a name, which some modelling code cannot read
    default = torch.get_default_dtype()
    torch.set_default_dtype(model.dtype)
    try:
        with torch.device(device or model.device):  # not by from_config, which would part it under ZeRO-3
            return (cls or type(model))(config)
    finally:
        torch.set_default_dtype(default)


def load_pruned(path: str | Path, **kwargs: Any) -> PreTrainedModel:
    """Load a model saved by ``APTTrainer`` (or ``save_pretrained`` of one): class, sizes and weights as saved.

    Args:
        path: Folder, or name on the hub.
        kwargs: As for ``from_pretrained`` of an Auto class: ``revision``, ``token``, ``cache_dir``, ``subfolder``,
            ``dtype``, ``device_map``, values of the config such as ``output_hidden_states``, and so on. ``base``:
            where the dense base of an exported adapter is, unless it is where it was.

    Returns:
        The model; with ``output_loading_info=True`` a tuple of it and a dictionary, as Auto classes do.

    Raises:
        UserError: ``path`` holds no complete pruned model, or cannot be reached.
    """
    check_names("loading")
    if (Path(path) / DIFFERENCE).is_file():
        from apt_trainer.store.adapter_folder import load_difference

        return load_difference(Path(path), **kwargs)  # type: ignore[no-any-return]
    check_folder(Path(path), kwargs.get("subfolder") or "")
    wants_info = kwargs.pop("output_loading_info", False)
    try:
        config = kwargs.get("config")
        if not isinstance(config, transformers.PreTrainedConfig):
            hub = {name: kwargs[name] for name in OF_HUB if name in kwargs}
            config = _read_config(path if config is None else config, hub)
        architecture = getattr(config, "apt_base_architecture", None)
        names = config.architectures or []
        if architecture is None and not (names and hasattr(config, DENSE_SIZES)):
            raise UserError(f"{path} is a stock model ({', '.join(names)}); load it with transformers.")
        options = kwargs | {"output_loading_info": True, "ignore_mismatched_sizes": True}  # they are looked at below
        cls = getattr(transformers, names[0]) if architecture is None else model_class(architecture)
        if not isinstance(config, cls.config_class):
            raise UserError(f"{path} is damaged: it says it is a {architecture}, with a {type(config).__name__}.")
        folder = Path(path) / (kwargs.get("subfolder") or "")
        check_sizes(folder, cls, config)
        if architecture is not None:
            check_sizes(folder, *dense_shape(config), most=OF_DENSE)
        model, info = cls.from_pretrained(path, **options)
    except UserError:
        raise
    except (OSError, ValueError, SafetensorError) as error:
        what = "is damaged or incomplete" if Path(path).is_dir() else "could not be loaded"
        raise UserError(f"{path} {what}: {str(error).strip().splitlines()[0]}") from error
    checked = ["missing_keys", "unexpected_keys"]
    if not kwargs.get("ignore_mismatched_sizes", False):
        checked.append("mismatched_keys")
    # what a base model by itself makes anew, such as the pooler, which not every model had that it comes from
    anew = tuple(f"{name}." for name in family_of(model.config).trained_base)
    found = {key: [name for name in info[key] if not str(name).startswith(anew)] for key in checked}
    problems = [f"{len(names)} {key.replace('_', ' ')}" for key, names in found.items() if names]
    if problems:
        raise UserError(f"{path} is damaged or incomplete: {', '.join(problems)}.")
    return (model, info) if wants_info else model


def _read_config(path: Any, hub: dict[str, Any]) -> Any:
    """The config in ``path``; raises :class:`UserError` for values that no config of its class has."""

    def retell(error: Exception) -> Exception:
        same = isinstance(error, (OSError, UserError))  # which says itself where it looked
        return error if same else UserError(f"The config of {path} is damaged ({reason(error)}).")

    with Retold(retell):
        return transformers.AutoConfig.from_pretrained(path, **hub)
