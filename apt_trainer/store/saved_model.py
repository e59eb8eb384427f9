"""The format of a finished model, and how it loads: stock modelling code, other sizes, equal logits.

``config.json`` carries the stock config under an own model type ("apt_" + base) plus ``apt_structure``: parameter
shapes, size attributes and no-op modules that differ from the dense model; ``apt_post_norm_policy``, where it is not
the default, says which no-ops those are to be (``models.family``). A stock loader does not know the type and
fails loudly instead of filling missing weights at random. Loading builds the stock class on the meta device, applies
the structure and lets Hugging Face fill it; it needs no remote code. ``apt_kept`` tells which units of the dense model
are left (``PruningPlan.packed``), for who prunes further. With ``apt_plan`` the layers run by an execution
plan (``painting``); the rest of the config is then still that of the layers, one after the other.
Not for checkpoints inside a run (``training.checkpoint``).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from apt_trainer.errors import UserError
from apt_trainer.libraries.private_names import check_names
from apt_trainer.models import FAMILIES, ModelFamily
from apt_trainer.models.execution import put_plan
from apt_trainer.models.execution_plan import Plan, plan_from_json
from apt_trainer.models.sizes import ConfigView, get_size, set_size
from apt_trainer.models.stubs import STUB_KINDS, STUBS, put_stub
from apt_trainer.plan.pruning_plan import PruningPlan

FORMAT_VERSION = 2
_WITHOUT_PLAN = 1  # what a model without an execution plan is saved as: older versions can read it
PREFIX = "apt_"
KEPT = "apt_kept"
_DENSE = "apt_per_layer"  # in memory only: what the config of a model with an execution plan says about its layers
_SIZES = ("in_features", "out_features", "embedding_dim", "normalized_shape", "nf", "nx")

Structure = dict[str, dict[str, Any]]


def describe_structure(model: nn.Module, dense: nn.Module, family: ModelFamily, plan: PruningPlan) -> Structure:
    """What sets ``model`` apart from ``dense`` (which may be on the meta device)."""
    structure: Structure = {"replaced": {}, "parameters": {}, "attributes": {}}
    for path, module in model.named_modules():
        if type(module) in STUB_KINDS:
            structure["replaced"][path] = STUB_KINDS[type(module)]
            continue
        original = dense.get_submodule(path)
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.shape != getattr(original, name).shape:
                structure["parameters"][f"{path}.{name}"] = list(parameter.shape)
        for name in _SIZES:
            if getattr(module, name, None) != getattr(original, name, None):
                value = getattr(module, name)
                structure["attributes"].setdefault(path, {})[name] = list(value) if isinstance(value, tuple) else value
    for space in family.spaces(dense):
        for path, name, value in space.sizes(plan.kept[space.name]):
            if get_size(dense.get_submodule(path), name) != value:
                kept = list(value) if isinstance(value, tuple) else value
                structure["attributes"].setdefault(path, {})[name] = kept
    return structure


def apply_structure(model: nn.Module, structure: Mapping[str, Mapping[str, Any]]) -> None:
    """Give a freshly built dense ``model`` the shapes of ``structure``; new parameters are not initialised."""
    for path, kind in structure["replaced"].items():
        if kind not in STUBS:
            raise UserError(
                f"The checkpoint replaces {path} by {kind!r}, which this version of apt_trainer does not know."
            )
        put_stub(model, path, kind)
    for full_name, shape in structure["parameters"].items():
        path, _, name = full_name.rpartition(".")
        module = model.get_submodule(path)
        old = module._parameters[name]
        assert old is not None
        module._parameters[name] = nn.Parameter(torch.empty(shape, dtype=old.dtype, device=old.device))
    for path, attributes in structure["attributes"].items():
        module = model.get_submodule(path)
        for name, value in attributes.items():
            if not all(isinstance(number, int) for number in (value if isinstance(value, list) else [value])):
                raise UserError(f"The checkpoint gives {path}.{name} the value {value!r}; sizes are whole numbers.")
            set_size(module, name, tuple(value) if isinstance(value, list) else value)


@cache
def config_class(model_type: str) -> type[PreTrainedConfig]:
    """Config class for pruned models of a stock ``model_type``.

    An instance announces its model class to the Auto classes.
    """
    base: Any = type(AutoConfig.for_model(model_type))

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        architecture = kwargs.pop("apt_base_architecture", None)
        version = kwargs.pop("apt_format_version", _WITHOUT_PLAN)
        structure, plan = kwargs.pop("apt_structure", None), kwargs.pop("apt_plan", None)
        base.__init__(self, *args, **kwargs)
        if version > FORMAT_VERSION:
            raise UserError(
                f"The checkpoint has format {version}, this version of apt_trainer reads up to {FORMAT_VERSION}."
            )
        FAMILIES[model_type].keeps_norms(self)
        self.describe(architecture, structure, plan)

    def describe(self: Any, architecture: str | None, structure: Any, plan: Any = None) -> None:
        self.apt_base_model_type = model_type
        self.apt_format_version = _WITHOUT_PLAN if plan is None else FORMAT_VERSION
        self.apt_base_architecture, self.apt_structure = architecture, structure
        if plan is not None:
            self.apt_plan = plan
        if architecture is not None:
            _announce(model_class(model_type, architecture), base)

    def to_dict(self: Any) -> dict[str, Any]:
        values = base.to_dict(self)
        return values | _under_own_names(self, values.pop(_DENSE, {}))

    namespace = {"model_type": PREFIX + model_type, "__init__": __init__, "describe": describe, "to_dict": to_dict}
    return type("Apt" + base.__name__, (base,), namespace | {"__module__": __name__})


def _under_own_names(config: PreTrainedConfig, values: Mapping[str, Any]) -> dict[str, Any]:
    """``values`` of attributes as ``config`` stores them."""
    return {config.attribute_map.get(name, name): value for name, value in values.items()}


def put_saved_plan(model: PreTrainedModel, plan: Plan) -> None:
    """Let ``model``, whose class is of this format, run by ``plan`` and say so when it is saved."""
    setattr(model.config, _DENSE, put_plan(model, plan))


@cache
def model_class(model_type: str, architecture: str) -> type[PreTrainedModel]:
    """Subclass of a stock model class that builds itself with the structure in its config."""
    base: Any = getattr(transformers, architecture, None)
    if not (isinstance(base, type) and issubclass(base, PreTrainedModel)):
        raise UserError(
            f"The checkpoint is for {architecture!r}, which is no model class of the installed transformers."
        )

    def __init__(self: Any, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        check_names("loading")
        if config.apt_base_architecture != architecture:
            raise UserError(
                f"The model was saved as {config.apt_base_architecture} and cannot load as {architecture}."
            )
        for name, value in vars(config).pop(_DENSE, {}).items():
            setattr(config, name, value)
        config.__class__ = stock_config  # a stock model may look up the class of its base by that of its config
        try:
            base.__init__(self, config, *args, **kwargs)  # type: ignore[misc]
        finally:
            config.__class__ = own_config
        apply_structure(self, config.apt_structure)
        if getattr(config, "apt_plan", None) is not None:
            put_saved_plan(self, plan_from_json(config.apt_plan, model_type, config.num_hidden_layers))
        self.tie_weights()

    own_config = config_class(model_type)
    stock_config = own_config.__mro__[1]
    namespace = {"config_class": own_config, "__init__": __init__, "__module__": __name__}
    return type("Apt" + base.__name__, (base,), namespace)


def _announce(cls: type[PreTrainedModel], stock_config: type[PreTrainedConfig]) -> None:
    """Register ``cls`` with every Auto class that serves its stock class."""
    stock = cls.__mro__[1]
    for name in dir(transformers.models.auto):
        auto = getattr(transformers.models.auto, name) if name.startswith("AutoModel") else None
        mapping = getattr(auto, "_model_mapping", None)
        if mapping is not None and stock_config in mapping and stock in _classes(mapping[stock_config]):
            auto.register(cls.config_class, cls, exist_ok=True)  # type: ignore[union-attr]


def _classes(entry: Any) -> tuple[type, ...]:
    return entry if isinstance(entry, tuple) else (entry,)


def register() -> None:
    """Make the Auto classes recognise pruned models of every family. Called on ``import apt_trainer``."""
    for model_type in FAMILIES:
        AutoConfig.register(PREFIX + model_type, config_class(model_type), exist_ok=True)


def as_pruned(model: PreTrainedModel, family: ModelFamily, plan: PruningPlan) -> None:
    """Turn a cut model, in place, into the class that saves and loads with its structure.

    A stock model whose shapes are those of the dense one stays a stock model.
    """
    dense = dense_copy(model, "meta")
    structure = describe_structure(model, dense, family, plan)
    if hasattr(model.config, "apt_structure"):
        model.config.describe(model.config.apt_base_architecture, structure)
    elif any(structure.values()):
        become_own(model, structure)
    else:
        return
    setattr(model.config, KEPT, plan.packed(family.spaces(dense)))


def become_own(model: PreTrainedModel, structure: Structure, plan: Mapping[str, Any] | None = None) -> None:
    """Give the stock ``model``, in place, the class and config of this format."""
    stock = type(model)
    shared, model_type = model.config, model.config.model_type
    config = copy.deepcopy(shared)  # not made anew: some configs read their own values differently the second time
    config.__class__ = config_class(model_type)
    config.describe(stock.__name__, structure, plan)
    model.__class__ = model_class(model_type, stock.__name__)
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
    values.pop("model_type", None)
    stock = cls.config_class(**{name: value for name, value in values.items() if not name.startswith("apt_")})
    stock._attn_implementation = config._attn_implementation
    return cls, stock


def dense_copy(model: PreTrainedModel, device: torch.device | str | None = None) -> PreTrainedModel:
    """A model of the stock class and size that ``model`` was cut from, with random weights: for sizes and speed.

    It is made on ``device`` at once, by default that of ``model``; "meta" is enough to count.
    """
    cls, config = dense_shape(model.config)
    default = torch.get_default_dtype()
    torch.set_default_dtype(model.dtype)
    try:
        with torch.device(device or model.device):  # not by from_config, which would part it under ZeRO-3
            return (cls or type(model))(config)
    finally:
        torch.set_default_dtype(default)


def load_pruned(path: str | Path, **kwargs: Any) -> PreTrainedModel:
    """Load a model saved by ``APTTrainer`` (or ``save_pretrained`` of one): class, sizes and weights as saved.

    ``kwargs`` as ``from_pretrained``. Raises :class:`UserError` when ``path`` holds no complete pruned model.
    """
    check_names("loading")
    if not (Path(path) / "config.json").is_file():
        raise UserError(f"{path} holds no config.json. Give the folder that a run wrote its model to.")
    config = AutoConfig.from_pretrained(path)
    architecture = getattr(config, "apt_base_architecture", None)
    if architecture is None:
        names = config.architectures or []
        raise UserError(f"{path} is a stock model ({', '.join(names)}); load it with transformers.")
    cls = model_class(config.apt_base_model_type, architecture)
    try:
        model, info = cls.from_pretrained(path, config=config, output_loading_info=True, **kwargs)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} is damaged or incomplete: {str(error).splitlines()[0]}") from error
    problems = [
        f"{len(info[key])} {key.replace('_', ' ')}"
        for key in ("missing_keys", "unexpected_keys", "mismatched_keys")
        if info[key]
    ]
    if problems:
        raise UserError(f"{path} is damaged or incomplete: {', '.join(problems)}.")
    return model  # type: ignore[no-any-return]
