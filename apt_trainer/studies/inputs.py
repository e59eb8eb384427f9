"""The model and the calibration data of a request, and measurements that can be stopped and go on."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from apt_trainer.errors import UserError
from apt_trainer.measure import count_parameters
from apt_trainer.models import family_of
from apt_trainer.models.family import POST_NORM_POLICY
from apt_trainer.scoring.sublayers.costs import Shape
from apt_trainer.scoring.sublayers.impact import Key, Losses
from apt_trainer.scoring.sublayers.loss import loss_name, refuse_broken
from apt_trainer.scoring.sublayers.units import Units, find_units
from apt_trainer.scoring.sublayers.windows import Calibration, from_rows, from_text
from apt_trainer.settings import ModelSettings, resolve_path
from apt_trainer.settings.choices import POST_NORM_POLICIES
from apt_trainer.store.pretrained import (
    choose_device,
    load_saved,
    load_shape,
    load_tokenizer,
    read_config,
    refuse_images,
    refuse_quantised,
)
from apt_trainer.studies.journal import Journal

PROGRESS_FILE = "impact.jsonl"
LONGEST_WINDOW = 512
REMOVE_NORM = POST_NORM_POLICIES[0]


@dataclass(frozen=True)
class DataRequest:
    """``data``: a text, a text file, or a ``.jsonl`` file of rows with ``text`` and ``label``; at most ``samples``
    windows of ``length`` tokens (default: 512, or what the model takes)."""

    data: str
    samples: int = 64
    length: int | None = None
    batch_size: int = 1
    seed: int = 0


@dataclass
class Loaded:
    """A model on the meta device first, with weights once :meth:`load` was called.

    ``post_norm_policy``: what is left of a sublayer that is off or dropped (``models.family``).
    """

    settings: ModelSettings
    tokenizer: Any
    model: Any
    units: Units
    calibration: Calibration | None
    post_norm_policy: str = REMOVE_NORM

    def load(self, device: str | None) -> None:
        place = choose_device(device)
        self.model = load_saved(self.settings).to(place).eval()
        self.units.family.set_post_norm_policy(self.model.config, self.post_norm_policy)

    def read(self, data: DataRequest, content: str | None = None) -> Calibration:
        """Data as batches of this model, which may be without weights; ``content``: what the file holds, if known."""
        content = _read(data.data) if content is None else content
        limit = getattr(self.model.config, "max_position_embeddings", None) or LONGEST_WINDOW
        length = data.length or min(LONGEST_WINDOW, limit)
        if data.data.endswith(".jsonl"):
            rows = content.splitlines()
            return from_rows(rows, self.tokenizer, self.model, data.samples, min(length, limit), data.batch_size)
        place = (self.tokenizer, self.model, self.units)
        try:
            return from_text(content, *place, data.samples, length, data.batch_size, data.seed)
        except UserError as error:
            hint = "" if content is not data.data else " (There is no such file, so data was taken as the text.)"
            raise UserError(f"{error}{hint}") from error

    @property
    def shape(self) -> Shape:
        """Where seconds and cached bytes are counted: the windows of the calibration, else 1 × 128 tokens or fewer."""
        if self.calibration is not None and self.calibration.length is not None:
            return Shape(len(self.calibration.batches[0]["input_ids"]), self.calibration.length)
        return Shape(1, min(128, getattr(self.model.config, "max_position_embeddings", None) or 128))

    @property
    def place(self) -> str:
        """The device that the model is on, where seconds are timed."""
        return str(self.model.device)

    @property
    def model_type(self) -> str:
        """Of the dense original."""
        config = self.model.config
        return str(getattr(config, "apt_base_model_type", config.model_type))

    def described(self) -> dict[str, Any]:
        """The calibration and the model, for reports and for telling whether a run goes on with the same."""
        data = self.calibration
        policy = self.post_norm_policy
        return {
            **({} if policy == REMOVE_NORM else {"post_norm_policy": policy}),
            "model": self.settings.model_name_or_path,
            "model_type": self.model_type,
            "parameters": count_parameters(self.model),
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "calibration": None if data is None else {"rows": data.rows, "length": data.length, "sha256": data.sha256},
        }


def prepare(settings: ModelSettings, data: DataRequest | None, post_norm_policy: str | None = REMOVE_NORM) -> Loaded:
    """Tokenizer, shapes and data; no weights. ``post_norm_policy``: what is left of a sublayer that goes; None: as the
    model has it."""
    content = None if data is None else _read(data.data)
    config = read_config(settings)
    refuse_quantised(config, str(settings.model_name_or_path))
    refuse_images(config, "A study of layers")
    family = family_of(config)
    if family.repeats(config) > 1:
        raise UserError(
            f"{config.model_type} runs one layer many times, so that no layer can be looked at or dropped by itself. "
            "Prune its heads, neurons and hidden dimensions: apt-trainer train."
        )
    policy = str(post_norm_policy or getattr(config, POST_NORM_POLICY, REMOVE_NORM))
    family.set_post_norm_policy(config, policy)
    tokenizer = load_tokenizer(settings)
    with torch.device("meta"):
        model = load_shape(settings)
    family.set_post_norm_policy(model.config, policy)
    at = Loaded(settings, tokenizer, model, find_units(model), None, policy)
    if data is not None and content is not None:
        at.calibration = at.read(data, content)
    return at


def _read(data: str) -> str:
    """Content of the file that ``data`` names, or ``data`` itself."""
    try:
        path = Path(resolve_path(data))
        if not path.is_file():
            if data.endswith((".jsonl", ".txt")) and len(data.split()) == 1:
                raise UserError(f"{data}: there is no such file.")
            return data
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{data}: cannot be read as text: {error}. Give a plain text file in UTF-8.") from error
    except OSError:  # a text too long to be the name of a file
        return data


def open_folder(output: str, resume: bool) -> Path:
    """The folder to write to; raises :class:`UserError` rather than lose an unfinished measurement."""
    folder = check_folder(output, resume)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def check_folder(output: str, resume: bool, progress: str = PROGRESS_FILE) -> Path:
    """As :func:`open_folder`, but makes nothing. ``progress``: the file that measurements are kept in one by one."""
    folder = Path(output)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{output} is a file. Name a folder.")
    begun = (folder / progress).exists()
    if begun and not resume:
        raise UserError(f"{output} holds an earlier measurement. Go on with --resume, or remove {progress} there.")
    if resume and not begun:
        raise UserError(f"{output} holds no measurement to resume. Leave --resume out.")
    return folder


def read_progress(at: Loaded, folder: Path) -> Journal:
    """What earlier runs on the same model and data kept in ``folder``, which from now on can be resumed.

    Raises :class:`UserError` where they were on others.
    """
    journal = Journal(folder / PROGRESS_FILE, at.described())
    journal.write()
    return journal


def stored_losses(at: Loaded, folder: Path, analysed: Mapping[Key, float] | None = None) -> Losses:
    """Losses that are kept in ``folder`` one by one, those of an earlier run on the same model and data included, and
    those ``analysed`` before.

    Raises :class:`UserError` where that of the full model, which is measured at once, is not finite; nothing of the
    measurement then stays in ``folder``.
    """
    assert at.calibration is not None
    file = folder / PROGRESS_FILE
    journal = read_progress(at, folder)
    events = [event for event in journal.earlier if "without" in event]
    known = dict(analysed or {}) | {tuple(event["without"]): _from_json(event["loss"]) for event in events}

    def record(key: Key, value: float) -> None:
        journal.add({"without": list(key), "loss": value if math.isfinite(value) else None})

    losses = Losses(at.model, at.units, at.calibration.batches, known, record)
    try:
        refuse_broken(losses.without(()), loss_name(at.model, at.units))
    except UserError:  # nothing that another try could go on with
        file.unlink()
        raise
    return losses


def analysed_losses(at: Loaded, path: str) -> dict[Key, float]:
    """Losses in a ``scores.json`` of ``analyze``; raises :class:`UserError` for one of another model or other data."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
        default = {"post_norm_policy": REMOVE_NORM}  # left out where it is that
        made_with = default | found
        same = all(made_with[key] == value for key, value in (default | at.described()).items())
        rows = {row["name"]: row for row in found["units"]}
        dense = float(found["loss_dense"])
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error}. Give scores.json of apt-trainer analyze.") from error
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"{path} holds no losses of apt-trainer analyze ({error!r}). Analyze with method nri."
        ) from error
    if not same:
        raise UserError(
            f"{path} is of another model or other data. Give the model, dtype, data, samples, length, seed and "
            "post_norm_policy that it was made with, or leave scores out."
        )
    losses: dict[Key, float] = {(): dense}
    for unit in at.units.members:
        row = rows.get(at.units.label(unit), {})
        if "loss" in row:
            losses[tuple(sorted(part.name for part in at.units.parts([unit])))] = _from_json(row["loss"])
    return losses


def _from_json(value: float | None) -> float:
    return math.inf if value is None else value
