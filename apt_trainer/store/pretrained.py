"""Tokenizers, image processors, configs and models from the hub, a folder, an installed package or a GGUF file.

Weights of a GGUF file are de-quantised when they load and are ordinary tensors from then on. Other quantised weights
cannot be cut and are refused before they load. Not for the format of pruned models (``store.saved_model``).
"""

from __future__ import annotations

import copy
import logging
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, GgufConfig, PreTrainedModel

from apt_trainer.errors import UserError
from apt_trainer.models import family_of
from apt_trainer.models.labels import HEADS, has_head, match_teacher
from apt_trainer.settings import CHOICES, DataSettings, ModelSettings, resolve_path
from apt_trainer.settings.packages import TOKENIZERS, require
from apt_trainer.settings.recipe import Recipe
from apt_trainer.store.saved_model import OF_HUB, dense_shape, load_pruned, model_class
from apt_trainer.store.stock import DENSE_SIZES, with_dense_sizes
from apt_trainer.tasks import IMAGE, TaskData, architecture_of, load_task

GGUF = ".gguf"
_OF_SENTENCE_TRANSFORMERS = "modules.json"
_log = logging.getLogger(__name__)


class Source(NamedTuple):
    """Where a model is: hub name or folder, and the GGUF file in it, if it is one."""

    path: str
    gguf_file: str | None = None


def find_source(path: str, gguf_file: str | None = None) -> Source:
    """Resolve ``package:`` and part the path of a GGUF file into folder and file.

    Raises:
        UserError: two GGUF files are named, or one that is not in its local folder.
    """
    local = resolve_path(path)
    if _names_a_gguf_file(local):
        folder, name = str(Path(local).parent), Path(local).name
        if gguf_file not in (None, name):
            raise UserError(f"{path} is one GGUF file and gguf_file={gguf_file!r} another. Name one of them.")
        local, gguf_file = folder, name
    if gguf_file is not None and Path(local).is_dir() and not (Path(local) / gguf_file).is_file():
        found = ", ".join(sorted(file.name for file in Path(local).glob(f"*{GGUF}"))) or "none"
        raise UserError(f"{local} holds no file {gguf_file!r}. GGUF files there: {found}.")
    if (Path(local).is_absolute() or local.startswith((".", "~"))) and not Path(local).is_dir():
        raise UserError(f"{path}: there is no such folder.")
    return Source(local, gguf_file)


def _names_a_gguf_file(path: str) -> bool:
    """Whether ``path`` ends in a file; "owner/name.gguf" with no such folder here is a repository on the hub."""
    place = Path(path)
    return path.endswith(GGUF) and not place.is_dir() and (place.parent.is_dir() or path.count("/") > 1)


def load_inputs(model: ModelSettings, recipe: Recipe, trained: bool = True) -> tuple[Any, Any, TaskData]:
    """(tokenizer or image processor, config, data) of ``model`` on the data of ``recipe``; reads no weights.

    ``trained``: whether the model is going to be; else it has to have the head and the labels of the data. Raises
    :class:`UserError` for a model without a family before any data are read.
    """
    args = recipe.training
    config = load_config(model)
    family_of(config)
    architecture = architecture_of(config)
    tokenizer = load_processor(model, config)
    seed = args.seed if args.data_seed is None else args.data_seed
    data = load_task(
        recipe.data if trained else _with_training_data(recipe.data),
        tokenizer,
        seed,
        max_positions=max_positions(config),
        architecture=architecture,
        config=config,
        trained=trained,
    )
    if not trained:
        _check_head(config, data, str(model.model_name_or_path))
    return tokenizer, config, data


def _with_training_data(data: DataSettings) -> DataSettings:
    """``data`` for a model that is not going to be trained, which may be given without training data."""
    if data.train_file is not None or data.dataset_name is not None:
        return data
    file = data.test_file or data.validation_file
    return replace(data, train_file=file, validation_file=data.validation_file or file)


def _check_head(config: Any, data: TaskData, path: str) -> None:
    """Raise :class:`UserError` for a saved model whose outputs are not those of the task."""
    ending = data.model_class.removeprefix("AutoModel")
    if ending in HEADS and config.architectures and not has_head(config, ending):
        raise UserError(
            f"{path} is a {config.architectures[0]}, which has no trained head for this task (…{ending}). Evaluate a "
            "fine-tuned model, or set the task that it was trained for."
        )
    wanted, problem = data.model_kwargs.get("problem_type"), getattr(config, "problem_type", None)
    if None not in (wanted, problem) and wanted != problem:
        raise UserError(
            f"{path} was trained for {problem}, but the task is {wanted}. Set the task it was trained for."
        )
    if config.num_labels != data.model_kwargs.get("num_labels", config.num_labels):
        raise UserError(
            f"{path} has {config.num_labels} outputs per row, but the task needs {data.model_kwargs['num_labels']}."
        )


def load_tokenizer(settings: ModelSettings) -> Any:
    """The tokenizer, from beside the model or out of its GGUF file unless another one is named."""
    if settings.tokenizer_name_or_path is not None:
        settings = settings.of(settings.tokenizer_name_or_path)
    source = source_of(settings)
    try:
        return _from_hub(AutoTokenizer.from_pretrained, source, **_place(settings))
    except UserError as error:  # transformers names one of these, which may be the wrong one
        if any(package.modules[0] in str(error).lower() for package in TOKENIZERS):
            for package in TOKENIZERS:
                require(package, f"The tokenizer of {source.path}")
        raise


def load_processor(settings: ModelSettings, config: Any) -> Any:
    """What makes inputs for the model of ``config``: the tokenizer or, of images, the image processor."""
    if architecture_of(config) != IMAGE:
        return load_tokenizer(settings)
    if settings.tokenizer_name_or_path is not None:
        settings = settings.of(settings.tokenizer_name_or_path)
    return _from_hub(AutoImageProcessor.from_pretrained, source_of(settings), **_place(settings))


def load_config(settings: ModelSettings) -> Any:
    """The config; raises :class:`UserError` for a model that cannot be trained and cut because it is quantised."""
    source = source_of(settings)
    if settings.dtype not in CHOICES["dtype"]:
        quantised = " Weights of a GGUF file are de-quantised when they load." if source.gguf_file else ""
        raise UserError(f"dtype={settings.dtype!r} is not one of {', '.join(CHOICES['dtype'])}.{quantised}")
    config = read_config(settings)
    refuse_quantised(config, str(settings.model_name_or_path))
    return config


def read_config(settings: ModelSettings) -> Any:
    """The config, whatever it says; raises :class:`UserError` where there is none, or for an attention that cannot
    compute in the type of the weights."""
    config = _from_hub(AutoConfig.from_pretrained, source_of(settings), **_options(settings))
    attention = settings.attn_implementation or ""
    # under bf16: true it would fail once training is over
    if "flash" in attention and _dtype(config, settings.dtype) == torch.float32:
        raise UserError(
            f"attn_implementation={attention!r} computes in bfloat16 and float16 only, and dtype is float32. "
            "Set dtype: bfloat16, or attn_implementation: sdpa."
        )
    return config


def refuse_images(config: Any, what: str) -> None:
    """Raise :class:`UserError` where ``config`` is of a model of images, and ``what`` reads text."""
    if architecture_of(config) == IMAGE:
        raise UserError(
            f"{what} reads text, and {config.model_type} takes images. Train it, and prune heads, neurons, hidden "
            "dimensions or whole sublayers, with apt-trainer train (task: image_classification)."
        )


def refuse_quantised(config: Any, path: str) -> None:
    """Raise :class:`UserError` where ``config`` announces quantised weights (bitsandbytes, gptq, awq …)."""
    found = getattr(config, "quantization_config", None) or getattr(
        config.get_text_config(decoder=True), "quantization_config", None
    )
    if found is None:
        return
    values = found if isinstance(found, dict) else found.to_dict()
    method = getattr(values.get("quant_method"), "value", values.get("quant_method")) or "an unnamed method"
    bits = next((n for n in (4, 8) if values.get(f"load_in_{n}bit")), values.get("bits"))
    raise UserError(
        f"{path} holds weights quantised with {method}{f' ({bits} bits)' if bits else ''}, which cannot be cut or "
        "trained in full. Name the model it was made from, or a GGUF file, which is de-quantised when it loads."
    )


def build_model(config: Any, data: TaskData, device: str, dtype: str = "auto") -> PreTrainedModel:
    """A model for the task on ``device`` ("meta" for shapes alone), without loading weights; ``dtype``: theirs.

    Raises :class:`UserError` for a pruned model that has another head.
    """
    auto, architecture = _task_class(config, data), getattr(config, "apt_base_architecture", None)
    mapping = getattr(transformers, data.model_class)._model_mapping
    if architecture is not None and type(config) not in mapping:
        raise UserError(
            f"The pruned model was saved as {architecture}, but the task needs one of {data.model_class}. Tune it for "
            "the task of its head, or prune the dense model with a head for this task."
        )
    config = copy.deepcopy(config)
    for name, value in data.model_kwargs.items():
        setattr(config, name, value)
    with torch.device(device):
        model = auto(config) if issubclass(auto, PreTrainedModel) else auto.from_config(config)
    return model.to(_dtype(config, dtype))  # type: ignore[no-any-return]


def _task_class(config: Any, data: TaskData) -> Any:
    """What builds or loads a model for the task: an Auto class, or the first of several that it would choose among by
    the class a checkpoint was saved with, which may be one that cannot be trained."""
    auto = getattr(transformers, data.model_class)
    served = auto._model_mapping.get(type(config), None)
    return served[0] if isinstance(served, tuple) else auto


def load_model(settings: ModelSettings, data: TaskData) -> PreTrainedModel:
    """The pretrained model with the head of the task, fresh where the checkpoint has none."""
    source = source_of(settings)
    options = {"ignore_mismatched_sizes": True, **_weights(settings, source), **data.model_kwargs}
    if "id2label" in options:  # which says it, and transformers warns where a config has other labels
        options.pop("num_labels", None)
    with _own_report():
        load = _task_class(read_config(settings), data).from_pretrained
        model, found = _from_hub(load, source, **options, output_loading_info=True)
    _tell_new_weights(model, found, source.path)
    return model  # type: ignore[no-any-return]


@contextmanager
def _own_report() -> Iterator[None]:
    """Without the table of transformers that lists a head which is new, as it has to be; asked for more, it stays."""

    def keep(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage() or loader.isEnabledFor(logging.INFO)

    loader = logging.getLogger("transformers.modeling_utils")
    loader.addFilter(keep)
    try:
        yield
    finally:
        loader.removeFilter(keep)


def _tell_new_weights(model: PreTrainedModel, found: Mapping[str, Any], path: str) -> None:
    """Warn of weights that begin at random though the checkpoint should have had them: all but those of a new head."""
    inside = f"{model.base_model_prefix}."
    missing = sorted(name for name in found["missing_keys"] if name.startswith(inside))
    resized = sorted(str(name) for name, *_ in found["mismatched_keys"])
    for names, why in ((missing, "are not in it"), (resized, "have other shapes there")):
        if names:
            shown = f"{', '.join(names[:3])}{' …' if len(names) > 3 else ''}"
            _log.warning("%s: %d weights begin at random, since they %s: %s.", path, len(names), why, shown)


def load_teacher(settings: ModelSettings, data: TaskData) -> PreTrainedModel:
    """A model that was fine-tuned for the task, with the labels that its config gives it.

    Raises :class:`UserError` where weights are missing, which would be random.
    """
    source = source_of(settings)
    kept = {name: value for name, value in data.model_kwargs.items() if name == "pad_token_id"}
    options = {**_weights(settings, source), **kept, "output_loading_info": True}
    model, found = _from_hub(_task_class(read_config(settings), data).from_pretrained, source, **options)
    if found["missing_keys"]:
        raise UserError(
            f"teacher_name_or_path={settings.model_name_or_path!r} lacks weights for this task "
            f"({', '.join(sorted(found['missing_keys'])[:3])}), so it would teach at random. Give a model that was "
            "fine-tuned for it."
        )
    return model  # type: ignore[no-any-return]


def check_teacher(settings: ModelSettings, data: TaskData, model: PreTrainedModel, tokenizer: Any) -> PreTrainedModel:
    """The teacher of ``settings`` on the meta device; reads no weights.

    Raises:
        UserError: it has other labels or another vocabulary than ``model`` with its ``tokenizer``, or no head for the
            task. Without a tokenizer beside it, the sizes of the vocabularies are compared.
    """
    source, config = source_of(settings), read_config(settings)
    ending = data.model_class.removeprefix("AutoModel")
    if ending in HEADS and config.architectures and not has_head(config, ending):
        raise UserError(
            f"teacher_name_or_path={settings.model_name_or_path!r} is a {config.architectures[0]}, which has no "
            f"trained head for this task (…{ending}). Give a model that was fine-tuned for it."
        )
    with torch.device("meta"):
        cls = _task_class(config, data)
        teacher: PreTrainedModel = cls(config) if issubclass(cls, PreTrainedModel) else cls.from_config(config)
    match_teacher(model, teacher, tokenizer)
    if not hasattr(tokenizer, "get_vocab"):
        return teacher
    try:
        theirs = AutoTokenizer.from_pretrained(source.path, **_place(settings)).get_vocab()
    except (OSError, ValueError):
        return teacher
    ours = tokenizer.get_vocab()
    other = sorted(token for token in ours if theirs.get(token) != ours[token])
    if other:
        raise UserError(
            f"teacher_name_or_path={settings.model_name_or_path!r} has another vocabulary than the model: "
            f"{len(other):,} of {len(ours):,} tokens have another number there, such as {other[0]!r}. Give a teacher "
            "with the same tokenizer."
        )
    return teacher


def load_saved(settings: ModelSettings, data: TaskData | None = None) -> PreTrainedModel:
    """A finished model, pruned or stock, with the head it was saved with; a GGUF file is a language model."""
    source = source_of(settings)
    config = read_config(settings)
    options = _weights(settings, source)
    if getattr(config, "apt_base_architecture", None) or (data is None and hasattr(config, DENSE_SIZES)):
        return _from_hub(load_pruned, source, **options)  # type: ignore[no-any-return]
    return _from_hub(_saved_class(config, source, data).from_pretrained, source, **options)  # type: ignore[no-any-return]


def load_dense_shape(settings: ModelSettings) -> PreTrainedModel:
    """The dense model that a saved one was cut from, with random weights: for size and speed. Reads the config."""
    return _dense(settings, with_dense_sizes(read_config(settings)))


def load_shape(settings: ModelSettings) -> PreTrainedModel:
    """A saved model, pruned or stock, with random weights: for sizes. Reads the config."""
    config = read_config(settings)
    architecture = getattr(config, "apt_base_architecture", None)
    if architecture is None:
        return _dense(settings, config)
    model = model_class(architecture)(config)
    return model.to(_dtype(config, settings.dtype))  # type: ignore[no-any-return]


def _dense(settings: ModelSettings, config: Any) -> PreTrainedModel:
    """The dense model of ``config``, with random weights."""
    if settings.attn_implementation:
        config._attn_implementation = settings.attn_implementation
    cls, stock = dense_shape(config)
    cls = cls or _saved_class(config, source_of(settings), None)
    model = cls(stock) if issubclass(cls, PreTrainedModel) else cls.from_config(stock)
    return model.to(_dtype(config, settings.dtype))  # type: ignore[no-any-return]


def dtype_of(settings: ModelSettings) -> torch.dtype:
    """Type that the weights of a model load in. Reads the config."""
    return _dtype(read_config(settings), settings.dtype)


def dtype_name(dtype: torch.dtype) -> str:
    """ "bfloat16" of ``torch.bfloat16``."""
    return str(dtype).removeprefix("torch.")


def _dtype(config: Any, asked: str) -> torch.dtype:
    """Type of weights; "auto" is what they were saved in, as ``config`` says."""
    found = getattr(config, "dtype", None) if asked == "auto" else asked
    return getattr(torch, str(found or torch.float32).removeprefix("torch."))  # type: ignore[no-any-return]


def _saved_class(config: Any, source: Source, data: TaskData | None) -> Any:
    if data is not None:
        return getattr(transformers, data.model_class)
    if source.gguf_file is not None:
        encoder_decoder = getattr(config, "is_encoder_decoder", False)
        return transformers.AutoModelForSeq2SeqLM if encoder_decoder else transformers.AutoModelForCausalLM
    name = (config.architectures or [""])[0]
    if hasattr(transformers, name):
        return getattr(transformers, name)
    of_its_own = getattr(config, "auto_map", None) or {}  # a model that comes with code
    autos = [auto for auto, path in of_its_own.items() if auto.startswith("AutoModel") and path.endswith(f".{name}")]
    return getattr(transformers, autos[0] if autos else "AutoModel")


def choose_device(asked: str | None = None) -> torch.device:
    """``asked``, or by default the accelerator if there is one, else the CPU; :class:`UserError` if it is absent."""
    if asked is None:
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        torch.empty(1, device=asked)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        # torch's answers to an unknown name, to a kind it was built without, and to one without this operation
        raise UserError(
            f"device={asked!r} cannot be used here. Choose cpu, or an accelerator such as cuda."
        ) from error
    return torch.device(asked)


def max_positions(config: Any) -> int | None:
    """Longest input in tokens, None when the config does not say."""
    limit = getattr(config, "max_position_embeddings", None)
    return None if limit is None else int(limit)


def source_of(settings: ModelSettings) -> Source:
    """Where the model of ``settings`` is; raises :class:`UserError` when none is named."""
    if settings.model_name_or_path is None:
        raise UserError("model_name_or_path is missing. Give a hub name, a local folder or package:NAME/folder.")
    return find_source(settings.model_name_or_path, settings.gguf_file)


def compares_texts(settings: ModelSettings) -> bool:
    """Whether the model is one of sentence-transformers, which says itself how embeddings are made."""
    path = source_of(settings).path
    if Path(path).is_dir():
        return (Path(path) / _OF_SENTENCE_TRANSFORMERS).is_file()
    try:
        hf_hub_download(path, _OF_SENTENCE_TRANSFORMERS, **cache_of(settings))
    except (HfHubHTTPError, HFValidationError, OSError):  # no such file, or none that can be reached
        return False
    return True


def cache_of(settings: ModelSettings) -> dict[str, Any]:
    """Which version of a repository on the hub, and the folder of downloads, where it is not the usual one."""
    return {"revision": settings.model_revision, "cache_dir": (settings.model_init_kwargs or {}).get("cache_dir")}


def _options(settings: ModelSettings) -> dict[str, Any]:
    """Arguments of ``from_pretrained`` for whatever is read from the place of the model."""
    further = settings.model_init_kwargs or {}
    if isinstance(further.get("token"), str):
        raise UserError(
            "model_init_kwargs holds a token, which would be written into the results. Put it into the environment "
            "variable HF_TOKEN."
        )
    for name, instead in _HAS_A_SETTING.items():
        if name in further:
            raise UserError(f"model_init_kwargs: {name} is not for there. Use {instead}.")
    trust = settings.trust_remote_code
    return {"revision": settings.model_revision, "trust_remote_code": trust, **further}


def _place(settings: ModelSettings) -> dict[str, Any]:
    """Those of them that say where files are, whatever they hold."""
    options = {name: value for name, value in _options(settings).items() if name in OF_HUB}
    return options | {"trust_remote_code": settings.trust_remote_code}


# no such files, an argument that the model does not take, content that is damaged in some way …
_UNREADABLE: tuple[type[Exception], ...] = (
    ArithmeticError,
    AttributeError,
    ImportError,
    LookupError,
    OSError,
    SafetensorError,
)
_UNREADABLE += (StrictDataclassError, TypeError, ValueError, struct.error)
_HAS_A_SETTING = {
    "revision": "model_revision",
    "trust_remote_code": "the setting of that name",
    "dtype": "the setting of that name",
    "torch_dtype": "dtype",
    "attn_implementation": "the setting of that name",
    "gguf_file": "the setting of that name",
    "device_map": "--device of evaluate and benchmark; a run chooses its devices itself",
    "quantization_config": "--quantize of evaluate",
}


def _weights(settings: ModelSettings, source: Source) -> dict[str, Any]:
    options = _options(settings) | {"dtype": settings.dtype}
    if settings.attn_implementation:
        options["attn_implementation"] = settings.attn_implementation
    if source.gguf_file is not None:
        options["quantization_config"] = GgufConfig(dequantize=True)  # or kernels, if installed, keep them packed
    return options


def _from_hub(load: Any, source: Source, **options: Any) -> Any:
    if source.gguf_file is not None:
        options["gguf_file"] = source.gguf_file
    try:
        return load(source.path, **options)
    except UserError:
        raise
    except _UNREADABLE as error:
        name = source.path if source.gguf_file is None else str(Path(source.path) / source.gguf_file)
        said = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"{name} could not be loaded: {said[0]}") from error
