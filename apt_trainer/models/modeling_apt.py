"""A transformer with uneven layers: the stock class of transformers, other sizes, no-ops where a sublayer was.

``config.json`` carries the stock config under an own model type ("apt_" + base) and ``apt_structure``, which tells a
model from the dense one of that config: ``replaced`` modules and the no-ops in their place, shapes of ``parameters``
(null: as the config says, so that vocabularies and labels may change), size ``attributes``, and ``hidden``, where
hidden dimensions were cut: how many are left, and which sides of the base model and of every head carry them.
A structure holds the base model only; a head gets its width from ``hidden``, whichever head it is.

Classes have the name of the stock class, since other libraries look classes up by name; a config instance has the
model type of the stock config for the same reason, and is saved under its own.

A saved folder carries a copy of this file, by which transformers loads the model (``trust_remote_code=True``) where
apt_trainer is not installed. So it imports torch and transformers only.
"""

from __future__ import annotations

import hashlib
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

FORMAT_VERSION = 3
PREFIX = "apt_"
CLASS_PREFIX = "Apt"
CODE_FILE = "modeling_apt.py"
DENSE = "apt_per_layer"
"""In memory only: what the config of a model with an execution plan says about its layers."""
CODE_HASH = "apt_code_sha256"
"""Attribute of a config: that of the copy of this file beside it."""
REMOTE_CODE = "apt_remote_code"
"""Attribute of a config: whether a save writes this file too; it does where that is absent."""
WEIGHTS, NOT_STOCK = "transformers_weights", "load_with_apt_trainer.load_pruned.safetensors"
"""Entry of a saved config by which a stock class, called by its name, looks for the weights, and a file that is not
there: it stops, instead of filling what the dense model has more at random."""
_OWN = ("apt_base_architecture", "apt_format_version", "apt_structure", "apt_plan")

HOOKS: dict[str, Callable[..., None]] = {}
"""What apt_trainer adds: "config" is called with each config of a model, "plan" with a model that has an execution
plan. Empty where apt_trainer is not installed."""


# ---- how a module is called: argument names are read from it, since releases of transformers change them ----

_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def positional_names(module_class: type[nn.Module]) -> tuple[str, ...]:
    """Names of what ``forward`` of ``module_class`` may be given by position, in their order."""
    parameters = list(inspect.signature(module_class.forward).parameters.values())[1:]
    return tuple(parameter.name for parameter in parameters if parameter.kind in _POSITIONAL)


def by_name(names: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """All arguments of a call by name; ``names``: :func:`positional_names` of what is called."""
    return dict(zip(names, args, strict=False)) | dict(kwargs)


def cache_in(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """The key-value cache among the arguments of a call, known by its type; None where there is none."""
    return next((value for value in (*args, *kwargs.values()) if isinstance(value, transformers.Cache)), None)


# ---- no-ops ----


class NoOp(nn.Module):
    """``replaced``: the module it stands for; None: one that takes all by position."""

    silent = False
    """Whether the output is nothing: zeros in the shape of what it replaces."""

    def __init__(self, replaced: nn.Module | None = None) -> None:
        super().__init__()
        if isinstance(replaced, NoOp):
            self.names: tuple[str, ...] = replaced.names
        else:
            self.names = () if replaced is None else positional_names(type(replaced))

    def given(self, number: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
        """Argument ``number`` of a call, which may be given by its name."""
        return args[number] if number < len(args) else kwargs[self.names[number]]  # type: ignore[no-any-return]


class PassAttention(NoOp):
    """Returns the hidden states it was given and no attention weights."""

    def forward(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
        return self.given(0, args, kwargs), None


class ZeroAttention(NoOp):
    """Adds nothing to the residual stream; returns no attention weights.

    Puts a token of width 1 into its own slot of the key-value cache for each token it sees: the length of the cache
    is read from the first layer, whose attention may be this one.
    """

    silent = True

    def __init__(self, replaced: nn.Module | None = None) -> None:
        super().__init__(replaced)
        self.layer_idx = getattr(replaced, "layer_idx", None)

    def forward(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
        hidden_states, cache = self.given(0, args, kwargs), cache_in(args, kwargs)
        if cache is not None and self.layer_idx is not None:
            token = hidden_states.new_zeros(hidden_states.shape[0], 1, hidden_states.shape[1], 1)
            getattr(cache, "self_attention_cache", cache).update(token, token, self.layer_idx)
        return torch.zeros_like(hidden_states), None


class ZeroCrossAttention(NoOp):
    """Adds nothing to the residual stream; returns no attention weights. Keeps nothing of what it would have read."""

    silent = True

    def forward(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
        return torch.zeros_like(self.given(0, args, kwargs)), None


class PassBiasedAttention(NoOp):
    """Returns the hidden states and the position bias that it was given, and no attention weights."""

    def forward(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None, None]:
        return self.given(0, args, kwargs), by_name(self.names, args, kwargs).get("position_bias"), None


class ZeroFeedForward(NoOp):
    """Adds nothing to the residual stream."""

    silent = True

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return torch.zeros_like(self.given(0, args, kwargs))


class ZeroInGraph(NoOp):
    """Adds nothing to the residual stream, but what made its input stays in the graph: a norm that nothing else may
    read any more, and for whose gradients DDP waits."""

    silent = True

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return 0.0 * self.given(0, args, kwargs)


class PassFirst(NoOp):
    """Returns its first argument."""

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.given(0, args, kwargs)


class PassSecond(NoOp):
    """Returns its second argument: the residual input of an output module that adds and normalises."""

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.given(1, args, kwargs)


STUBS: dict[str, type[NoOp]] = {
    "pass_attention": PassAttention,
    "pass_biased_attention": PassBiasedAttention,
    "zero_attention": ZeroAttention,
    "zero_cross_attention": ZeroCrossAttention,
    "zero_feed_forward": ZeroFeedForward,
    "zero_in_graph": ZeroInGraph,
    "pass_first": PassFirst,
    "pass_second": PassSecond,
}
STUB_KINDS: dict[type[nn.Module], str] = {cls: kind for kind, cls in STUBS.items()}


def put_stub(model: nn.Module, path: str, kind: str) -> None:
    """Replace the module at ``path`` of ``model`` by a no-op of ``kind``."""
    model.set_submodule(path, STUBS[kind](model.get_submodule(path)))


# ---- sizes that a module keeps ----

Size = int | tuple[int, ...]


class ConfigView:
    """The shared config, of which one module sees some values changed."""

    def __init__(self, shared: Any) -> None:
        self.shared = shared

    def __getattr__(self, name: str) -> Any:  # only for what is not changed
        if name == "shared" or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.shared, name)


def get_size(module: nn.Module, name: str) -> Any:
    """Value of a size attribute; None where the module has none."""
    owner, _, last = name.rpartition(".")
    return getattr(getattr(module, owner) if owner else module, last, None)


def set_size(module: nn.Module, name: str, value: Size) -> None:
    """Set a size attribute of ``module`` and of no other."""
    if get_size(module, name) == value:
        return
    owner, _, last = name.rpartition(".")
    if not owner:
        if last == "kept_heads" and not isinstance(module, BiasOfKeptHeads):
            module.__class__ = _with_bias_of_kept_heads(type(module))  # type: ignore[arg-type]
        setattr(module, last, value)
        return
    config = getattr(module, owner)
    if not isinstance(config, ConfigView):
        config = ConfigView(config)
        setattr(module, owner, config)
    setattr(config, last, value)


class BiasOfKeptHeads(nn.Module):
    """Mixed into an attention that lost heads and shares its position bias with all layers of its stack.

    Of the bias [batch or 1, heads of the dense model, T, S], only the rows of ``kept_heads`` are used here. Attentions
    that hand it on pass it through whole. Where none comes in, it is made by the attention's own table, whose columns
    are those of all dense heads; an attention without such a table (cross-attention) has none and hands none on. Keeps
    nothing between calls.
    """

    kept_heads: tuple[int, ...]
    names: tuple[str, ...]  # of what the attention's own forward takes by position

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        given = by_name(self.names, args, kwargs)
        position_bias, cache = given.get("position_bias"), cache_in(args, kwargs)
        # Read before the attention itself appends to the cache; a static cache counts in place.
        seen: Any = 0 if cache is None else cache.get_seq_length(self.layer_idx)
        seen = seen.clone() if torch.is_tensor(seen) else seen
        if position_bias is not None:
            given["position_bias"] = self._chosen(position_bias)
        if not hasattr(self, "has_relative_attention_bias"):  # the encoder hands it to each layer
            return super().forward(**given)  # type: ignore[no-any-return]
        output, used, weights = super().forward(**given)
        if position_bias is None and self.has_relative_attention_bias:
            position_bias = super().compute_bias(*used.shape[-2:], device=used.device, past_seen_tokens=seen)  # type: ignore[misc]
        return output, position_bias, weights

    def compute_bias(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Bias [1, kept heads, T, S], for the attention's own forward."""
        return self._chosen(super().compute_bias(*args, **kwargs))  # type: ignore[misc]

    def _chosen(self, bias: torch.Tensor) -> torch.Tensor:
        return bias.index_select(1, torch.tensor(self.kept_heads, device=bias.device))


@cache
def _with_bias_of_kept_heads(attention: type[nn.Module]) -> type[nn.Module]:
    namespace = {"__module__": __name__, "names": positional_names(attention)}
    return type(attention.__name__, (BiasOfKeptHeads, attention), namespace)


# ---- the structure of a model ----


def apply_structure(model: nn.Module, config: Any) -> None:
    """Give a freshly built dense ``model`` the sizes that ``config`` tells; raises ValueError where they cannot be.

    The first rows and columns of each parameter stay, so that what was initialised is. Nothing is allocated that the
    dense model does not hold already: a size can only be smaller. What a model of another class than the saved one
    does not have, such as the decoder, leaves the structure in ``config``.
    """
    structure = config.apt_structure
    if type(model).__name__ != config.apt_base_architecture:
        structure = config.apt_structure = _of_this_class(model, structure)
    for path, kind in structure["replaced"].items():
        if kind not in STUBS:
            raise ValueError(f"The checkpoint replaces {path} by {kind!r}, which this version does not know.")
        put_stub(model, _resolve(model, path), kind)
    for full_name, shape in structure["parameters"].items():
        path, _, name = full_name.rpartition(".")
        _shrink(model.get_submodule(_resolve(model, path)), name, shape, full_name)
    for path, attributes in structure["attributes"].items():
        module = model.get_submodule(_resolve(model, path))
        for name, value in sorted(attributes.items()):  # "kept_heads" before the number of heads
            _set_checked(module, name, value, path)
    hidden = structure.get("hidden")
    if hidden is not None:
        sides = list(hidden_sides(model, hidden))
        for path, side in dict.fromkeys(sides):  # one that is named twice reads two vectors side by side
            _cut_side(model.get_submodule(path), side, hidden["size"] * sides.count((path, side)), path)


def check_form(structure: Any) -> None:
    """Raise ValueError where ``structure``, read from a file, is not of the form that this module describes."""
    if not (_is_dict(structure) and _has_parts(structure) and _has_sides(structure.get("hidden"))):
        raise ValueError("apt_structure in the config is damaged or of no known form.")


def _has_parts(structure: Any) -> bool:
    parts = [structure.get(name) for name in ("replaced", "parameters", "attributes")]
    if not all(map(_is_dict, parts)):
        return False
    replaced, _, attributes = parts
    return all(isinstance(kind, str) for kind in replaced.values()) and all(map(_is_dict, attributes.values()))


def _has_sides(hidden: Any) -> bool:
    if hidden is None:
        return True
    heads: Any = hidden.get("heads") if _is_dict(hidden) else None
    if not (_is_dict(heads) and all(map(_is_dict, heads.values()))):
        return False
    lists = [hidden.get("reads"), *(names for head in heads.values() for names in head.values())]
    return all(isinstance(names, list) and all(isinstance(name, str) for name in names) for names in lists)


def _is_dict(value: Any) -> bool:
    return isinstance(value, dict)


def _of_this_class(model: nn.Module, structure: Mapping[str, Any]) -> dict[str, Any]:
    """The part of ``structure`` that ``model`` has modules for."""
    part = dict(structure)
    for name in ("replaced", "attributes"):
        part[name] = {path: value for path, value in structure[name].items() if _find(model, path)}
    names = structure["parameters"]
    part["parameters"] = {name: names[name] for name in names if _find(model, name.rpartition(".")[0])}
    return part


def hidden_sides(model: nn.Module, hidden: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(path, "in", "out" or "norm") of what carries hidden dimensions beside the layers: readers such as a pooler, and
    the head of ``model``."""
    prefix = _prefix(model)
    sides = [(prefix + path, "in") for path in hidden["reads"]]
    name = type(model).__name__
    head = next((head for ending, head in hidden["heads"].items() if name.endswith(ending)), None)
    if head is None and (prefix or "For" in name):
        raise ValueError(
            f"{name} has a head that is not described for a model without some of its hidden dimensions. "
            f"Described: {', '.join(hidden['heads'])}."
        )
    for key, side in (("reads", "in"), ("writes", "out"), ("norms", "norm")):
        sides += [(path, side) for path in (head or {}).get(key, ())]
    return ((path, side) for path, side in sides if _has(model, path))


def _prefix(model: nn.Module) -> str:
    """Path of the base model inside ``model`` with its dot; empty when ``model`` is the base model."""
    name = getattr(model, "base_model_prefix", "")
    return f"{name}." if name and hasattr(model, name) else ""


def _find(model: nn.Module, path: str) -> str | None:
    """``path``, saved by a model with a head or by its base, in ``model``, which may be the one or the other."""
    prefix = getattr(model, "base_model_prefix", "")
    inner = path.removeprefix(f"{prefix}.")
    return next((name for name in (path, inner, f"{prefix}.{inner}") if _has(model, name)), None)


def _resolve(model: nn.Module, path: str) -> str:
    found = _find(model, path)
    if found is None:
        raise ValueError(f"The checkpoint names {path}, and {type(model).__name__} has no such module.")
    return found


def _has(model: nn.Module, path: str) -> bool:
    try:
        model.get_submodule(path)
    except AttributeError:
        return False
    return bool(path)


def _is_size(value: Any, most: int) -> bool:
    return type(value) is int and 0 < value <= most


def _shrink(module: nn.Module, name: str, shape: Any, where: str) -> None:
    """Keep the first rows and columns of a parameter; None in ``shape`` keeps a side as it is."""
    old = module._parameters.get(name)
    if old is None or not isinstance(shape, list) or len(shape) != old.dim():
        raise ValueError(f"The checkpoint gives {where} the shape {shape!r}, which does not fit the model.")
    if not all(size is None or _is_size(size, most) for size, most in zip(shape, old.shape, strict=True)):
        raise ValueError(
            f"The checkpoint gives {where} the shape {shape!r}; each side is a whole number from 1 to that of the "
            f"dense model, {list(old.shape)}."
        )
    kept = old.detach()[tuple(slice(None) if size is None else slice(size) for size in shape)].clone()
    module._parameters[name] = nn.Parameter(kept, requires_grad=old.requires_grad)


def _are_heads(value: Any, number: int) -> bool:
    """Whether ``value`` lists some of ``number`` heads in order."""
    return (
        isinstance(value, list)
        and value != []
        and all(type(v) is int for v in value)
        and (value == sorted(set(value)) and value[0] >= 0 and value[-1] < number)
    )


def _set_checked(module: nn.Module, name: str, value: Any, path: str) -> None:
    """Set a size attribute if ``value`` can be one: no larger than what is there, of the same form."""
    old = get_size(module, name)
    if name == "kept_heads":
        fits = _are_heads(value, get_size(module, "n_heads") or get_size(module, "num_attention_heads") or 0)
    elif isinstance(old, tuple):
        fits = isinstance(value, list) and len(value) == len(old) and all(map(_is_size, value, old))
    else:
        fits = type(old) is int and _is_size(value, old)
    if not fits:
        raise ValueError(
            f"The checkpoint gives {path}.{name} the value {value!r}, which is no size that it can have here."
        )
    set_size(module, name, tuple(value) if isinstance(value, list) else value)


def _cut_side(module: nn.Module, side: str, size: Any, path: str) -> None:
    """Cut the hidden side of a linear or a norm to ``size``, unless it has that size already."""
    if side == "norm":
        for name, parameter in module._parameters.items():
            if parameter is not None:
                _shrink(module, name, [size], f"{path}.{name}")
        if isinstance(getattr(module, "normalized_shape", None), tuple):
            _set_checked(module, "normalized_shape", [size], path)
    elif side == "in":
        _shrink(module, "weight", [None, size], f"{path}.weight")
        _set_checked(module, "in_features", size, path)
    else:
        _shrink(module, "weight", [size, None], f"{path}.weight")
        if module._parameters.get("bias") is not None:
            _shrink(module, "bias", [size], f"{path}.bias")
        _set_checked(module, "out_features", size, path)


# ---- configs ----


@cache
def config_class(model_type: str) -> type[Any]:
    """Config class for uneven models of a stock ``model_type``."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    base: Any = CONFIG_MAPPING[model_type]

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        own = {name: kwargs.pop(name, None) for name in _OWN}
        kwargs.pop(WEIGHTS, None)
        base.__init__(self, *args, **kwargs)
        version = own["apt_format_version"]
        if version is not None and not (type(version) is int and version <= FORMAT_VERSION):
            raise ValueError(
                f"The checkpoint has format {version}, this version of apt_trainer reads up to {FORMAT_VERSION}. "
                "Install a newer one."
            )
        self.describe(own["apt_base_architecture"], own["apt_structure"], own["apt_plan"])

    def describe(self: Any, architecture: str | None, structure: Any, plan: Any = None) -> None:
        self.model_type = self.apt_base_model_type = model_type
        self.apt_format_version = FORMAT_VERSION
        self.apt_base_architecture, self.apt_structure = architecture, structure
        if plan is not None:
            self.apt_plan = plan
        if structure is not None:
            check_form(structure)
            if getattr(self, "auto_map", None) is None:
                self.auto_map = auto_map(base)  # other libraries ask it which Auto class loads the model
        if "config" in HOOKS:
            HOOKS["config"](self)

    def to_dict(self: Any) -> dict[str, Any]:
        return _saved_form(self, base)

    def save_pretrained(self: Any, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        code = Path(save_directory) / CODE_FILE
        if carries_code(self):
            code.parent.mkdir(parents=True, exist_ok=True)
            code.write_bytes(own_code().encode())
        else:
            code.unlink(missing_ok=True)
        return base.save_pretrained(self, save_directory, *args, **kwargs)

    namespace = {"model_type": PREFIX + model_type, "__init__": __init__, "describe": describe, "to_dict": to_dict}
    namespace |= {"save_pretrained": save_pretrained, "register_for_auto_class": _already_registered}
    return type(CLASS_PREFIX + base.__name__, (base,), namespace | {"__module__": __name__})


def _saved_form(config: Any, base: Any) -> dict[str, Any]:
    """What ``to_dict`` of a ``config`` gives: that of its stock class ``base``, with the layers one after the other,
    the class that is saved and, where saves carry this file, what finds its classes."""
    values: dict[str, Any] = base.to_dict(config)
    values |= {config.attribute_map.get(name, name): value for name, value in values.pop(DENSE, {}).items()}
    names = [name.removeprefix(CLASS_PREFIX) for name in values.get("architectures") or ()]
    if names:  # set at each save, to that of the whole model or of its base
        values["apt_base_architecture"] = names[0]
        values["architectures"] = [CLASS_PREFIX + name for name in names]
    for name in ("auto_map", CODE_HASH):
        values.pop(name, None)
    values[WEIGHTS] = NOT_STOCK
    if carries_code(config):
        values |= {"auto_map": auto_map(base), CODE_HASH: sha256(own_code())}
    _teach_peft(base.model_type)
    return values


@classmethod  # type: ignore[misc]
def _already_registered(cls: Any, auto_class: Any = None) -> None:
    """For ``register_for_auto_class``, after which transformers would rewrite ``auto_map`` at the next save."""


def carries_code(config: Any) -> bool:
    """Whether a save of ``config`` writes this file: unless told not to, and where it is enough to load the model."""
    wanted = getattr(config, REMOTE_CODE, True) and getattr(config, "apt_structure", None) is not None
    return bool(wanted) and getattr(config, "apt_plan", None) is None


@cache
def own_code() -> str:
    """The text of this file."""
    return Path(__file__).read_bytes().decode()


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _teach_peft(model_type: str) -> None:
    """Let PEFT choose the modules for adapters as it does for the stock model; it reads the type from ``to_dict``."""
    constants = sys.modules.get("peft.utils.constants")
    for name, mapping in vars(constants).items() if constants else ():
        if name.startswith("TRANSFORMERS_MODELS_TO_") and model_type in mapping:
            mapping.setdefault(PREFIX + model_type, mapping[model_type])


# ---- models ----


@cache
def model_class(architecture: str) -> type[Any]:
    """Subclass of the stock model class ``architecture`` that builds itself with the sizes in its config."""
    found: Any = getattr(transformers, str(architecture), None)
    is_model = isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)
    if not is_model or found.config_class is None:
        raise ValueError(
            f"The checkpoint is for {architecture!r}, which is no model class of the installed transformers."
        )
    base: Any = found
    stock_config = base.config_class
    own_config = config_class(stock_config.model_type)

    def __init__(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        if getattr(config, "apt_structure", None) is None:
            raise ValueError(f"The config has no apt_structure, which {architecture} needs to know its sizes.")
        for name, value in vars(config).pop(DENSE, {}).items():
            setattr(config, name, value)
        config.__class__ = stock_config  # a stock model may look up the class of its base by that of its config
        try:
            base.__init__(self, config, *args, **kwargs)
        finally:
            config.__class__ = own_config
        apply_structure(self, config)
        config.apt_base_architecture = architecture
        if getattr(config, "apt_plan", None) is not None:
            if "plan" not in HOOKS:
                raise ValueError("The model runs by an execution plan. Install apt_trainer and import it to load it.")
            HOOKS["plan"](self)
        self.tie_weights()

    @classmethod  # type: ignore[misc]
    def from_pretrained(cls: Any, path: Any, *args: Any, **kwargs: Any) -> Any:
        saved = getattr(kwargs.get("config"), "apt_base_architecture", None) or architecture
        if saved == architecture or kwargs.get("ignore_mismatched_sizes"):
            return base.from_pretrained.__func__(cls, path, *args, **kwargs)
        options = kwargs | {"ignore_mismatched_sizes": True, "output_loading_info": True}
        model, info = base.from_pretrained.__func__(cls, path, *args, **options)
        _refuse_mismatch(model, [key[0] for key in info["mismatched_keys"]], path)
        return (model, info) if kwargs.get("output_loading_info") else model

    def save_pretrained(self: Any, *args: Any, remote_code: bool | None = None, **kwargs: Any) -> Any:
        if remote_code is not None:
            setattr(self.config, REMOTE_CODE, remote_code)
        self._keys_to_ignore_on_save = set()  # what is made anew, such as positions, would be that of the dense width
        return base.save_pretrained(self, *args, **kwargs)

    @classmethod  # type: ignore[misc]
    def _can_set_experts_implementation(cls: Any) -> bool:
        """That of the stock class, in whose file transformers looks for it."""
        return bool(base._can_set_experts_implementation())

    __init__.__annotations__ = {}  # vLLM looks whether arguments are of their types, which are strings here
    namespace = {"config_class": own_config, "__init__": __init__, "from_pretrained": from_pretrained}
    namespace |= {"save_pretrained": save_pretrained, "register_for_auto_class": _already_registered}
    namespace |= {"_can_set_experts_implementation": _can_set_experts_implementation}
    return type(architecture, (base,), namespace | {"__module__": __name__})


def _refuse_mismatch(model: nn.Module, keys: list[str], path: Any) -> None:
    """Raise RuntimeError where weights do not fit, except those of a head that is new and has the name of another."""
    hidden = model.config.apt_structure.get("hidden") or {"heads": {}}  # type: ignore[union-attr]
    heads = tuple(f"{name}." for head in hidden["heads"].values() for names in head.values() for name in names)
    wrong = [key for key in keys if not key.startswith(heads)]
    if wrong:
        raise RuntimeError(f"{path} has other sizes than its config says, first of all for {wrong[0]}.")


@cache
def stock_classes(config: Any) -> dict[str, tuple[type[Any], ...]]:
    """Name of each Auto class that serves stock ``config`` → the model classes that it may build."""
    auto: Any = transformers.models.auto.modeling_auto
    found = {}
    for name, value in vars(auto).items():
        mapping = getattr(value, "_model_mapping", None) if name.startswith("AutoModel") else None
        if mapping is not None and config in mapping:
            entry = mapping[config]
            classes = entry if isinstance(entry, tuple) else (entry,)
            if all(cls.config_class is config for cls in classes):
                found[name] = classes
    return found


def auto_map(config: Any) -> dict[str, str]:
    """``auto_map`` of uneven models of stock ``config``: name of an Auto class → name of a class of this module."""
    classes = {name: f"{CLASS_PREFIX}{served[0].__name__}" for name, served in stock_classes(config).items()}
    module = __name__.rpartition(".")[2]
    return {name: f"{module}.{cls}" for name, cls in {"AutoConfig": CLASS_PREFIX + config.__name__, **classes}.items()}


def __getattr__(name: str) -> Any:
    """Classes by the name of the stock one, with or without "Apt" before it: for pickles and for other libraries."""
    stock: Any = getattr(transformers, name.removeprefix(CLASS_PREFIX), None) if name[:1].isupper() else None
    if isinstance(stock, type) and issubclass(stock, transformers.PreTrainedModel):
        return model_class(stock.__name__)
    if isinstance(stock, type) and issubclass(stock, transformers.PreTrainedConfig):
        kind: Any = stock
        return config_class(kind.model_type)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
