"""A first recipe for a model and data that nobody has described: sensible values for their sizes, each with a reason.

What the data are is guessed in ``tasks.guess``; how long texts are is measured with the tokenizer of the model. Values
are those of the shipped recipes for the same kind of model. Not for trying values out: nothing is trained.
"""

from __future__ import annotations

import json
import math
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch

from apt_trainer import __version__
from apt_trainer.errors import UserError
from apt_trainer.models import family_of
from apt_trainer.report.tables import format_count
from apt_trainer.settings import DataSettings, MethodSettings, ModelSettings, check_choices, resolve_path
from apt_trainer.settings.packages import check_packages
from apt_trainer.settings.shipped import SCHEMAS
from apt_trainer.store.pretrained import (
    build_model,
    compares_texts,
    load_config,
    load_processor,
    max_positions,
)
from apt_trainer.tasks import TaskData, architecture_of, load_task
from apt_trainer.tasks.architecture import DECODER, ENCODER, ENCODER_DECODER, IMAGE
from apt_trainer.tasks.guess import Guess, guess
from apt_trainer.tasks.loading import FILE_FORMATS, PLAIN_TEXT, read_parts

_SAMPLE = 2000  # training rows whose length is measured
_LONGEST = 2048  # tokens; longer texts have to be asked for
_PERCENTILE = 98
_SMALL_MODEL = 100e6  # parameters up to which all of what is left is trained
_LARGE_MODEL = 1e9
_GOOD_STEPS = 1500
_FEW_STEPS = 40
_SEED = 42  # of runs, which decides which rows are held out
_COLUMN, _WIDTH = 32, 119
"""Where comments begin, and how long lines of words may be."""
_AS_THEY_COME = ("question_answering", "summarization", "translation", "embedding", "image_classification")
"""Tasks whose metrics need the order of rows, or whose rows have no length of their own."""
_IN_PIECES = ("language_modeling", "masked_language_modeling", "question_answering")
"""Tasks that part long texts."""
_LENGTHS = ("max_length", "max_target_length", "doc_stride")

Line = tuple[str, Any, str]
"""Key, value and comment of one line of a recipe; a key that begins with "#" is a line that is switched off."""


@dataclass
class FirstRecipe:
    """``text``: of the file; ``checks``: what a person should look at before it is trained."""

    text: str
    checks: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Facts:
    """What the values of a recipe depend on. ``rows``: to train on, about; ``lengths``: of texts in tokens, None:
    of images; ``limit``: the longest text that the model reads; ``parameters``: of the model."""

    architecture: str
    task: str
    rows: int
    lengths: np.ndarray | None
    target_lengths: np.ndarray | None
    limit: int
    positions: int | None
    parameters: int
    labels: Mapping[str, int]
    fast: bool

    @property
    def length(self) -> int:
        """Tokens that most of the rows fit in, in eights."""
        if self.task in _IN_PIECES:
            return min(self.limit, 384)
        assert self.lengths is not None
        return min(self.limit, _in_eights(np.percentile(self.lengths, _PERCENTILE)))


def first_recipe(model: ModelSettings, given: Mapping[str, Any], name: str | None) -> FirstRecipe:
    """The recipe.

    Args:
        model: What is to be trained.
        given: Keys of a recipe that are settled, where the data are among them.
        name: Of the file that it will be written to, for the commands in it; None: none.

    Raises:
        UserError: the model is not supported, or what the data are cannot be told.
    """
    config = load_config(model)
    family_of(config)
    architecture = architecture_of(config)
    images = architecture == IMAGE
    tokenizer = load_processor(model, config)
    of_data = {key: value for key, value in given.items() if key in {f.name for f in fields(DataSettings)}}
    check_choices(DataSettings(**of_data))
    by_form = {"task": "image_classification"} if images else _task_of_form(of_data, architecture)
    rows = read_parts(DataSettings(**{**by_form, **of_data}))["train"]
    found = guess(
        rows,
        {**by_form, **of_data},
        architecture,
        embeds=not images and compares_texts(model),
        has_chat=bool(getattr(tokenizer, "chat_template", None)),
    )
    check_packages(found.settings)
    if len(rows) < 500 and not {"validation_file", "dataset_name"} & set(found.settings):
        found.add("few rows: more of them tell more", validation_fraction=0.2)
    facts = _facts(found, given, tokenizer, config, len(rows))
    checks = [*found.checks, *_cut_texts(facts, given.get("max_length")), *_checks_of(facts)]
    sections = _sections(model, given, found, facts)
    return FirstRecipe(_text(sections, _heading(model, found, facts, name, sections), checks), checks)


def _facts(found: Guess, given: Mapping[str, Any], tokenizer: Any, config: Any, rows: int) -> _Facts:
    """What some of the ``rows`` and the model without weights tell."""
    seed = next((given[key] for key in ("data_seed", "seed") if given.get(key) is not None), _SEED)
    architecture = architecture_of(config)
    limit = min(max_positions(config) or _LONGEST, getattr(tokenizer, "model_max_length", _LONGEST), _LONGEST)
    task = _measured(found, tokenizer, config, limit, seed)
    lengths = targets = None
    if architecture != IMAGE:
        lengths = np.array([len(ids) for ids in _rows_of_ids(task.train["input_ids"][:])])
    if task.model_class == "AutoModelForSeq2SeqLM":
        targets = np.array([len(ids) for ids in task.train["labels"][:]])
    return _Facts(
        architecture=architecture,
        task=found.settings["task"],
        rows=_to_train_on(found.settings, rows, len(task.train)),
        lengths=lengths,
        target_lengths=targets,
        limit=limit,
        positions=max_positions(config),
        parameters=sum(p.numel() for p in build_model(config, task, "meta").parameters()),
        labels=task.label_counts,
        fast=torch.accelerator.is_available(),
    )


def _task_of_form(given: Mapping[str, Any], architecture: str) -> dict[str, Any]:
    """The task where the form of the training data leaves only one."""
    path = given.get("train_file")
    if path is None or given.get("task") is not None:
        return {}
    if Path(resolve_path(path)).expanduser().is_dir():
        return {"task": "classification", "text_column": "text", "label_column": "label"}
    masked = "masked_" if architecture == ENCODER else ""
    return {"task": f"{masked}language_modeling"} if path.lower().endswith(PLAIN_TEXT) else {}


def _measured(found: Guess, tokenizer: Any, config: Any, limit: int, seed: int) -> TaskData:
    """Some of the data as the model will read them, none cut shorter than the model has to."""
    rows = found.settings.get("max_train_samples")
    lengths: dict[str, Any] = {"max_train_samples": min(rows or _SAMPLE, _SAMPLE), "max_validation_samples": 100}
    if found.settings["task"] != "image_classification":
        lengths["max_length"] = limit
    if found.settings["task"] in _IN_PIECES:
        lengths["max_length"] = min(limit, 384)
        lengths["doc_stride"] = min(DataSettings.doc_stride, lengths["max_length"] // 3)
    if found.settings["task"] in ("summarization", "translation"):
        lengths["max_target_length"] = limit
    settings = {key: value for key, value in found.settings.items() if key != "packing"}
    data = DataSettings(**{**settings, **lengths})
    return load_task(data, tokenizer, seed, config=config, architecture=architecture_of(config))


def _to_train_on(settings: Mapping[str, Any], rows: int, measured: int) -> int:
    """How many of ``rows`` are trained on, about, where ``measured`` are made of the first ones."""
    held_out = 0.0
    for part, default in (("validation", DataSettings.validation_fraction), ("test", DataSettings.test_fraction)):
        if f"{part}_file" not in settings and "dataset_name" not in settings:
            held_out += settings.get(f"{part}_fraction", default)
    used = min(rows * (1 - held_out), settings.get("max_train_samples") or math.inf)
    return max(1, round(measured * max(1.0, used / _SAMPLE)))


def _rows_of_ids(rows: Iterable[Any]) -> Iterable[Sequence[int]]:
    """Token ids of each text, where a row has several texts too."""
    return chain.from_iterable(row if row and isinstance(row[0], list) else [row] for row in rows)


# ------------------------------------------------------------------------------------------------ values


def _sections(
    model: ModelSettings, given: Mapping[str, Any], found: Guess, facts: _Facts
) -> list[tuple[str, list[Line]]]:
    """The recipe, section by section, with what is ``given`` in place of what would be proposed."""
    decoder = facts.architecture == DECODER
    data = [f.name for f in fields(DataSettings) if f.name in found.settings and f.name not in _LENGTHS]
    sections = [
        ("model", _of_model(model, facts)),
        ("data", [*((key, found.settings[key], found.reasons.get(key, "")) for key in data), *_of_lengths(facts)]),
        ("pruning", _pruning_of_decoder(facts) if decoder else _pruning_of_encoder(facts)),
        ("what trains", _adapters(facts)),
        ("distillation", _distillation(facts)),
        ("training", _training(facts, given)),
        ("measurement", _measurement(facts)),
        ("logging and output", _output(model, found)),
    ]
    named = {key for _, lines in sections for key, _, _ in lines}
    sections = [
        (title, [(key, given[key], "") if key in given else (key, value, why) for key, value, why in lines])
        for title, lines in sections
    ]
    further = [(key, value, "") for key, value in given.items() if key not in named]
    return [*sections, ("as asked", further)] if further else sections


def _of_model(model: ModelSettings, facts: _Facts) -> list[Line]:
    lines: list[Line] = [
        ("model_name_or_path", model.model_name_or_path, f"{format_count(facts.parameters)} parameters")
    ]
    default = ModelSettings()
    for each in fields(model):
        value = getattr(model, each.name)
        if each.name not in ("model_name_or_path", "dtype") and value != getattr(default, each.name):
            lines.append((each.name, value, ""))
    half = facts.architecture == DECODER and (facts.fast or facts.parameters > _SMALL_MODEL)
    return [*lines, ("dtype", "bfloat16", "half the memory of float32")] if half else lines


def _of_lengths(facts: _Facts) -> list[Line]:
    if facts.lengths is None:
        return []
    if facts.task in _IN_PIECES and facts.task != "question_answering":
        return [("max_length", facts.length, "tokens of a piece of text")]
    if facts.task == "question_answering":
        stride = min(DataSettings.doc_stride, facts.length // 3)
        return [("max_length", facts.length, "longer contexts are read in pieces"), ("doc_stride", stride, "")]
    lines: list[Line] = [("max_length", facts.length, _told_of(facts.lengths, facts.length))]
    if facts.target_lengths is not None:
        length = min(facts.limit, _in_eights(np.percentile(facts.target_lengths, _PERCENTILE)))
        lines.append(("max_target_length", length, _told_of(facts.target_lengths, length)))
    return lines


def _told_of(lengths: np.ndarray, length: int) -> str:
    inside = float((lengths <= length).mean())
    share = "all" if inside == 1 else f"{math.floor(1000 * inside) / 10:g} %"
    return f"tokens: {share} of the texts fit (half of them have {int(np.median(lengths))} or fewer)"


def _pruning_of_encoder(facts: _Facts) -> list[Line]:
    embeds = facts.task == "embedding"
    return [
        ("target_sparsity", 0.6, "share of the block parameters to remove; 0.4 costs less accuracy"),
        ("prune_targets", ["heads", "neurons"], "hidden: the width of the model too"),
        ("pruning_time", "early", "late: where few rows teach a hard task"),
        ("pruning_start", 0.05 if embeds else 0.1, "of all steps; before it the model learns the task"),
        ("pruning_end", 0.3, "the rest of the run recovers"),
        ("num_pruning_events", 5, ""),
    ]


def _pruning_of_decoder(facts: _Facts) -> list[Line]:
    return [
        ("target_sparsity", 0.3, "share of the block parameters to remove; 0.2 costs less"),
        ("prune_targets", ["heads", "neurons"], "hidden: the width of the model too"),
        ("pruning_time", "before", "one cut, then adapters recover"),
        ("calibration_samples", min(256, facts.rows), "rows that the cut is decided on"),
        ("num_pruning_events", 3, "how often ranks of adapters grow"),
        ("pruning_end", 0.25, "until when they grow, of all steps"),
    ]


def _adapters(facts: _Facts) -> list[Line]:
    lines: list[Line] = [("lora_r", 8, "rank of the adapters at first"), ("lora_alpha", 16, "usually twice lora_r")]
    if facts.architecture == DECODER or facts.parameters > _SMALL_MODEL:
        return [*lines, ("tune", "adapters", "")]
    return [
        *lines,
        ("tune_after_pruning", "full", "train all that is left: it is small"),
        ("full_learning_rate", 1e-4, "of weights that are no adapters"),
    ]


def _distillation(facts: _Facts) -> list[Line]:
    if facts.architecture == DECODER:
        return [("distillation", "none", "as APT for LLaMA")]
    lines: list[Line] = [
        ("distillation", "self", "learn from the model's own past"),
        ("distillation_weight", 0.5, "half of the loss stays the task's"),
    ]
    if facts.task == "embedding":
        lines += [
            ("prediction_weight", 10.0, "cosines are small beside the loss of pairs"),
            ("distillation_end", 1.0, ""),
        ]
    return lines


def _training(facts: _Facts, given: Mapping[str, Any]) -> list[Line]:
    batch, accumulated, epochs = _batches(facts)
    size = given.get("per_device_train_batch_size", batch)
    batches = math.ceil((facts.rows - _held_out(facts, given)) / size)
    steps = math.ceil(batches / given.get("gradient_accumulation_steps", accumulated)) * epochs
    large = facts.parameters > _SMALL_MODEL
    rate = {True: 1e-4 if facts.parameters > _LARGE_MODEL else 5e-4, False: 2e-4 if large else 1e-3}
    lines: list[Line] = [
        ("num_train_epochs", epochs, f"about {steps:,} steps"),
        ("per_device_train_batch_size", batch, "lower it if memory is short"),
        ("per_device_eval_batch_size", batch * 2, ""),
    ]
    if accumulated > 1:
        lines.append(("gradient_accumulation_steps", accumulated, f"batches of {batch * accumulated}"))
    lines += [
        ("train_sampling_strategy", "group_by_length", "less padding"),
        ("learning_rate", rate[facts.architecture == DECODER], "adapters and head only, hence high"),
        ("warmup_steps", 0.06, "below 1: a fraction of all steps"),
        ("lr_scheduler_type", "cosine" if facts.architecture == DECODER else "linear", ""),
        ("eval_strategy", "epoch", ""),
        ("seed", _SEED, ""),
    ]
    if facts.task in _AS_THEY_COME:
        lines = [line for line in lines if line[0] != "train_sampling_strategy"]
    lines.append(("bf16" if facts.fast else "# bf16", True, "half precision, on a GPU"))
    return lines


def _held_out(facts: _Facts, given: Mapping[str, Any]) -> int:
    """Training rows that choose the teacher and are not trained on."""
    values = {**{key: value for key, value, _ in _distillation(facts)}, **given}
    if values["distillation"] != "self" or values.get("target_sparsity", 0) is None:
        return 0
    return math.ceil(facts.rows * values.get("heldout_fraction", MethodSettings.heldout_fraction))


def _batches(facts: _Facts) -> tuple[int, int, int]:
    """(rows per batch, batches per step, epochs)"""
    if facts.architecture == DECODER:
        batch = max(1, min(8, 4096 // facts.length, facts.rows))
        accumulated = max(1, 16 // batch) if facts.rows >= 1000 else 1
        epochs = 1 if facts.rows > 20_000 else 2 if facts.rows > 2_000 else 3
    else:
        batch, accumulated = (32 if facts.rows > 20_000 else 16 if facts.rows > 200 else 4), 1
        epochs = min(20, max(3, round(_GOOD_STEPS * batch / facts.rows)))
    steps = max(1, facts.rows // (batch * accumulated))
    return batch, accumulated, max(epochs, min(20, math.ceil(_FEW_STEPS / steps)))


def _measurement(facts: _Facts) -> list[Line]:
    positions = facts.positions or _LONGEST
    new = min(32, positions // 4) if facts.architecture == DECODER else 0
    lines: list[Line] = [
        (
            "latency_batch_sizes",
            [1, 32 if facts.architecture != DECODER else 8],
            "timed beside the dense model at the end",
        ),
        *([] if facts.lengths is None else [("latency_length", min(128, positions - new), "tokens")]),
    ]
    if new and new < 32:
        lines.append(("latency_new_tokens", new, ""))
    export = "gguf_q8_0" if facts.architecture == DECODER else "onnx_int8"
    if facts.architecture != ENCODER_DECODER:
        lines.append(("# export", [export], "another format too: pip install 'apt-trainer[export]'"))
    return [*lines, ("# dense_baseline", True, "fine-tune the dense model too, to compare with: as long again")]


def _output(model: ModelSettings, found: Guess) -> list[Line]:
    data = found.settings.get("train_file") or found.settings.get("dataset_name") or "run"
    path = str(model.model_name_or_path).removeprefix("package:")
    name = "_".join(re.sub(r"[^\w.-]+", "-", _short_name(each)) for each in (path, str(data)))
    return [
        ("output_dir", f"out/{name}", "the finished model and all records"),
        ("logging_steps", 10, ""),
        ("report_to", "none", "tensorboard, wandb …"),
    ]


def _short_name(path: str) -> str:
    """The last part of a path that says something."""
    place = Path(path.rstrip("/"))
    name = place.stem if place.suffix in (".gguf", *FILE_FORMATS, PLAIN_TEXT) else place.name
    return place.parent.name if name in ("model", "train", "data") and place.parent.name else name


def _cut_texts(facts: _Facts, given: int | None) -> list[str]:
    """How many texts do not fit, in the length that was ``given`` or is proposed."""
    lengths = facts.lengths
    if lengths is None or facts.task in _IN_PIECES:
        return []
    length, longest = given or facts.length, int(lengths.max())
    share = float(np.mean(lengths > length))
    if share == 0:
        return []
    more = " or more" if longest >= facts.limit else ""
    return [
        f"{share:.1%} of the texts are longer than max_length={length} and are cut; the longest has {longest:,}{more} "
        "tokens."
    ]


def _checks_of(facts: _Facts) -> list[str]:
    checks = []
    counts = [count for count in facts.labels.values() if count]
    if len(counts) > 1 and max(counts) > 10 * min(counts):
        rare = min((name for name in facts.labels if facts.labels[name]), key=lambda name: facts.labels[name])
        checks.append(
            f"Labels are uneven: the rarest, {rare!r}, has {min(counts):,} of {sum(counts):,} rows. class_weights: "
            "balanced lets rare ones count more, and metric: f1_macro counts all labels alike."
        )
    if facts.rows < 200:
        checks.append(f"{facts.rows} rows to train on are few: expect scores to vary with seed.")
    return checks


def _in_eights(number: float) -> int:
    return max(16, 8 * math.ceil(number / 8))


# ------------------------------------------------------------------------------------------------ the file


def _heading(
    model: ModelSettings, found: Guess, facts: _Facts, name: str | None, sections: list[tuple[str, list[Line]]]
) -> list[str]:
    values = {key: value for _, lines in sections for key, value, _ in lines}
    removed, when = values["target_sparsity"], "before" if values["pruning_time"] == "before" else "while"
    gone = "nothing" if removed is None else f"{removed:.0%} of the block parameters"
    about = (
        f"{found.settings['task']} with {model.model_name_or_path}, about {facts.rows:,} rows to train on, {gone} "
        f"pruned {when} it is fine-tuned."
    )
    config, output = name or "FILE.yaml", values["output_dir"]
    return [
        f"yaml-language-server: $schema={(SCHEMAS / 'recipe.json').as_uri()}",
        *textwrap.wrap(about, _WIDTH - 2),
        f"Written by apt-trainer init {__version__}. All keys: apt-trainer train --help. Any key can be overridden:",
        f"  apt-trainer plan    --config {config}                          # dry run: sizes, schedule, memory",
        f"  apt-trainer train   --config {config} --target_sparsity 0.4    # with another value",
        *_use(found.settings, output),
    ]


def _use(settings: Mapping[str, Any], output: str) -> list[str]:
    """A command that asks the finished model, where there is one."""
    task = settings["task"]
    if task == "masked_language_modeling":
        return []
    if task == "instruction_tuning" and (settings.get("messages_column") or settings.get("use_chat_template")):
        return [f"  apt-trainer chat {output}"]
    if task == "image_classification":
        return [f"  apt-trainer predict {output} --file IMAGE"]
    pair = settings.get("text_pair_column") is not None or task == "question_answering"
    return [
        f"  apt-trainer predict {output} --text '…'" + (" --text_pair '…'" if pair and task != "embedding" else "")
    ]


def _text(sections: list[tuple[str, list[Line]]], heading: list[str], checks: list[str]) -> str:
    lines = [f"# {line}" for line in heading]
    if checks:
        lines += ["#", "# Please check:"]
        for check in checks:
            lines += textwrap.wrap(check, _WIDTH, initial_indent="# - ", subsequent_indent="#   ")
    for title, of_section in sections:
        lines += ["", f"### {title}"]
        for key, value, comment in of_section:
            line = f"{key}: {_yaml(value)}"
            lines.append(f"{line:<{_COLUMN - 1}} # {comment}" if comment else line)
    return "\n".join(lines) + "\n"


_NUMBER = re.compile(r"[-+.]?[0-9].*|[-+]?\.(?:inf|nan)", re.IGNORECASE)


def _yaml(value: Any) -> str:
    """``value`` as YAML 1.2 on one line; JSON, but for texts that need no quotation marks."""
    if isinstance(value, str):
        plain = re.fullmatch(r"[\w./-][\w./ -]*(?:\w|/)|\w", value) and not _NUMBER.fullmatch(value)
        plain = plain and value.lower() not in ("null", "true", "false", "yes", "no", "on", "off", "y", "n")
        return value if plain and not value.startswith("-") else json.dumps(value, ensure_ascii=False)
    if isinstance(value, list):
        return f"[{', '.join(map(_yaml, value))}]"
    if isinstance(value, float) and 0 < abs(value) < 0.01:
        number, _, power = f"{value:e}".partition("e")
        return f"{number.rstrip('0').rstrip('.')}e{int(power)}"
    return json.dumps(value, ensure_ascii=False)


def write_new(path: Path, text: str) -> None:
    """Write a file that is not there yet; raises :class:`UserError` where it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise UserError(f"{path} is there already and is not written over. Choose another --output.") from None
