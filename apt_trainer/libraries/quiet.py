"""What other libraries say on the command line, and how this package's own warnings look there.

Left out is what concerns nobody who runs a command: bars without a name, optional packages that load as transformers
is imported but are not used, deprecations for developers. What concerns the run stays, and whoever has set a level of
a library (``TRANSFORMERS_VERBOSITY``, ``HF_DATASETS_DISABLE_PROGRESS_BARS``, ``PYTHONWARNINGS``) has the last word.
Only for processes that are a command: a library that is imported leaves logging alone.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import wrapt

OF_DEVELOPERS = (FutureWarning, DeprecationWarning)
_OPTIONAL = {"torchao": "quantize", "bitsandbytes": "quantize", "torch.utils._pytree": "quantize"}
"""Loggers that warn when transformers and PEFT import what is installed, and the word of a command that uses it."""
_HUB_OFF = "HF_HUB_DISABLE_PROGRESS_BARS"
_DATASETS_OFF = "HF_DATASETS_DISABLE_PROGRESS_BARS"
_active = 0


@contextmanager
def quiet(words: Sequence[str]) -> Iterator[None]:
    """For the time of the command ``words``, before anything heavy is imported."""
    global _active
    with ExitStack() as undo:
        if not sys.warnoptions:
            undo.enter_context(warnings.catch_warnings())
            for category in OF_DEVELOPERS:
                warnings.filterwarnings("ignore", category=category, module=r"(?!apt_trainer\b)")
        for name, used_by in _OPTIONAL.items():
            if not any(used_by in word for word in words):
                undo.enter_context(level_of(name, logging.ERROR))
        undo.enter_context(_filtered("DeepSpeed", _not_of_a_choice))
        undo.enter_context(_own_warnings())
        _active += 1
        undo.callback(_end)
        wrapt.register_post_import_hook(_no_bars_of_transformers, "transformers.utils.logging")
        wrapt.register_post_import_hook(_no_bars_of_datasets, "datasets.utils.tqdm")
        yield


def is_chief() -> bool:
    """Whether this process is the one that speaks: the first of those that a launcher started, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def write_line(text: str) -> None:
    """A line on standard error, above a bar if there is one; only in the process that speaks."""
    from tqdm import tqdm

    if is_chief():
        tqdm.write(text, file=sys.stderr)


def _end() -> None:
    global _active
    _active -= 1
    if _active == 0:
        if "transformers.utils.logging" in sys.modules and _HUB_OFF not in os.environ:
            sys.modules["transformers.utils.logging"].enable_progress_bar()
        if "datasets.utils.tqdm" in sys.modules and _DATASETS_OFF not in os.environ:
            sys.modules["datasets.utils.tqdm"].enable_progress_bars()


def _no_bars_of_transformers(module: Any) -> None:
    """Of weights and shards. Downloads, which may take long, keep their bars: those have names."""
    if _active and not is_chief():
        logger = module.get_logger("transformers")
        for handler in logger.handlers:
            handler.addFilter(lambda record: record.levelno >= logging.ERROR or logger.level < logging.WARNING)
    if _active and _HUB_OFF not in os.environ:
        from huggingface_hub.utils import enable_progress_bars

        module.disable_progress_bar()
        enable_progress_bars()


def _no_bars_of_datasets(module: Any) -> None:
    if _active and _DATASETS_OFF not in os.environ:
        module.disable_progress_bars()


def _not_of_a_choice(record: logging.LogRecord) -> bool:
    """DeepSpeed tells which accelerator it has chosen as soon as it is imported, used or not."""
    return record.module != "real_accelerator" or record.levelno >= logging.ERROR


@contextmanager
def level_of(name: str, level: int) -> Iterator[None]:
    """Only what is at least of ``level`` from the logger ``name`` and those below, where nobody has set another."""
    logger = logging.getLogger(name)
    before = logger.level
    if before == logging.NOTSET:
        logger.setLevel(level)
    try:
        yield
    finally:
        if before == logging.NOTSET:
            logger.setLevel(before)


@contextmanager
def _filtered(name: str, keep: Any) -> Iterator[None]:
    logger = logging.getLogger(name)
    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)


class _Line(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        write_line(self.format(record))


@contextmanager
def _own_warnings() -> Iterator[None]:
    """Warnings of this package as lines of their own, unless logging was set up; those of several processes once."""
    logger = logging.getLogger("apt_trainer")
    if logger.handlers or logging.getLogger().handlers:
        yield
        return
    handler = _Line(logging.WARNING if is_chief() else logging.ERROR)
    handler.setFormatter(_Formatter())
    logger.addHandler(handler)
    propagates, logger.propagate = logger.propagate, False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagates


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return f"{record.levelname.lower()}: {super().format(record)}"
