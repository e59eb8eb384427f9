"""Tasks of lm-evaluation-harness on a live model: its own ones by name, and local ones from YAML files.

The package ``lm_eval`` is optional and imported when used. Its own tasks fetch their data from a hub; tasks whose YAML
names local files need no network. Those that come with this package find them in the folder ``APT_TASK_DATA``.
"""

from __future__ import annotations

import difflib
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from apt_trainer.errors import UserError
from apt_trainer.evaluate.bootstrap import mean_interval
from apt_trainer.measure import evaluating
from apt_trainer.settings.shipped import TASKS
from apt_trainer.tasks.text_windows import without_closing

SEED = 1234


@dataclass(frozen=True)
class TaskOptions:
    """Tasks of lm-evaluation-harness and how they run: arguments of :func:`run_tasks`."""

    tasks: Sequence[str] = ()
    task_path: str | None = None
    limit: int | None = None
    num_fewshot: int | None = None
    batch_size: int = 1

    def described(self) -> dict[str, Any] | None:
        """What the scores depend on; None without tasks."""
        options = {"tasks": list(self.tasks), "limit": self.limit, "num_fewshot": self.num_fewshot}
        return options if self.tasks else None

    def run_tasks(self, model: PreTrainedModel, tokenizer: Any, seed: int = 0) -> dict[str, dict[str, Any]]:
        """As :func:`run_tasks`."""
        options = (self.task_path, self.limit, self.num_fewshot, self.batch_size)
        return run_tasks(model, tokenizer, self.tasks, *options, seed)


def run_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    task_path: str | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    batch_size: int = 1,
    seed: int = 0,
) -> dict[str, dict[str, Any]]:
    """Evaluate ``model`` with ``lm_eval.simple_evaluate``.

    Args:
        model: Decoder or encoder–decoder model with a language-model head, on any device.
        tokenizer: Its tokenizer.
        tasks: Names of tasks or groups, or paths of YAML files.
        task_path: Folder with further YAML files, which go before tasks of lm_eval with the same name; default: the
            ones that come with the package (``recipes/lm_eval``).
        limit: Use only the first examples of each task.
        num_fewshot: Examples before each question, where the task leaves that open.
        batch_size: Sequences per forward pass.
        seed: Of the confidence intervals.

    Returns:
        For each task (and group) its number of ``examples`` and ``metrics``: name to ``value`` and, where the value is
        the mean over examples, ``low`` and ``high`` of its 95 % confidence interval. A task of choices also has
        ``chance``, the accuracy of guessing.

    Raises:
        UserError: lm_eval is missing, a task is not known, its data cannot be read, or the model has no
            language-model head.
    """
    lm_eval, language_model = _imported()
    if not model.can_generate():
        raise not_a_language_model(type(model).__name__)
    if limit is not None and limit < 1:
        raise UserError(f"limit={limit} must be at least 1; leave it out to use all examples.")
    manager = _task_manager(tasks, task_path)
    backend = "causal"
    if model.config.is_encoder_decoder:
        backend, language_model = "seq2seq", _with_own_length(language_model)
    else:  # lm_eval would score and continue what follows the end of the text
        tokenizer = without_closing(tokenizer)
    with evaluating(model), _errors_only("lm_eval.models.huggingface", "lm_eval.api.task"), _data_of(tasks):
        wrapped = language_model(pretrained=model, tokenizer=tokenizer, backend=backend, batch_size=batch_size)
        found = lm_eval.simple_evaluate(
            wrapped,
            tasks=list(tasks),
            task_manager=manager,
            limit=limit,
            num_fewshot=num_fewshot,
            bootstrap_iters=0,  # intervals are drawn here, over the same examples
            random_seed=SEED,
            numpy_random_seed=SEED,
            torch_random_seed=SEED,
            fewshot_random_seed=SEED,
        )
    return {
        name: _summary(scores, found["samples"].get(name, []), seed)
        | _chance(found["configs"].get(name, {}), found["samples"].get(name, []))
        for name, scores in sorted(found["results"].items())
    }


def check_tasks(tasks: Sequence[str], task_path: str | None = None) -> None:
    """Raise :class:`UserError` if lm_eval is missing, a task is not known, or the data of a local task cannot be read,
    before hours of training say so."""
    _imported()
    _task_manager(tasks, task_path)
    local = _local_tasks(task_path)
    here = [name for name in tasks if _is_yaml(name) or name in local.all_subtasks]
    if here:
        with _errors_only("lm_eval.api.task"), _data_of(here):
            local.load(here)


def not_a_language_model(what: str) -> UserError:
    return UserError(
        f"{what} is no language model, so tasks of lm_eval cannot run on it. They need AutoModelForCausalLM or "
        "AutoModelForSeq2SeqLM."
    )


def _imported() -> tuple[Any, Any]:
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise UserError(
            f"Tasks of lm_eval need lm-evaluation-harness ({error}). Install it: pip install 'apt-trainer[lm_eval]'."
        ) from error
    return lm_eval, HFLM


def _with_own_length(base: Any) -> Any:
    """``base`` (``HFLM``) for a model with an encoder and a decoder, which generates as much as a task allows.

    lm_eval counts the prompt in the length to generate, which is right for decoders. Here answers would be longer by
    as many tokens as the longest prompt of their batch has.
    """

    class EncoderDecoder(base):  # type: ignore[misc]
        def _model_generate(self, context: Any, max_length: int, stop: list[str], **options: Any) -> Any:
            """``max_length`` as lm_eval says it: tokens of ``context`` and new ones."""
            new = max(1, max_length - context.shape[1])
            return super()._model_generate(context, 1 + new, stop, **options)  # after the decoder's start token

    return EncoderDecoder


def _task_manager(tasks: Sequence[str], task_path: str | None) -> Any:
    """Index of local tasks, and of those of lm_eval where they are needed, for reading those takes seconds."""
    from lm_eval.tasks import TaskManager

    if task_path is not None and not Path(task_path).is_dir():
        raise UserError(f"task_path={task_path!r} is not a folder. Give a folder with YAML files of tasks.")
    if not tasks:
        raise UserError("No task of lm_eval is named. Give names, or paths of YAML files.")
    local = _local_tasks(task_path)
    simple = set(local.all_subtasks)
    if all(name in simple or _is_yaml(name) for name in tasks):
        return local
    manager = TaskManager(include_path=str(task_path or TASKS))
    for name in tasks:
        if name not in manager.all_tasks and not _is_yaml(name):
            raise _unknown_task(name, local.all_tasks, manager.all_tasks)
    return manager


def _local_tasks(task_path: str | None) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=str(task_path or TASKS), include_defaults=False)


def _is_yaml(name: str) -> bool:
    return Path(name).suffix in (".yaml", ".yml") and Path(name).is_file()


def _unknown_task(name: str, local: Sequence[str], known: Sequence[str]) -> UserError:
    close = difflib.get_close_matches(name, known, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return UserError(
        f"{name!r} is neither a YAML file nor a task of lm_eval.{hint} Local tasks: {', '.join(local) or 'none'}."
    )


def _summary(scores: Mapping[str, Any], samples: Sequence[Mapping[str, Any]], seed: int) -> dict[str, Any]:
    """One task: lm_eval names a score "metric,filter" and keeps a value per metric in each sample of that filter."""
    metrics: dict[str, dict[str, float]] = {}
    for key, value in scores.items():
        name, _, choice = key.partition(",")
        if not choice or name.endswith("_stderr") or not isinstance(value, int | float):
            continue
        label = name if choice == "none" else f"{name} ({choice})"
        metrics[label] = {"value": float(value)}
        rows = [s[name] for s in samples if s.get("filter", "none") == choice and isinstance(s.get(name), int | float)]
        if rows and math.isclose(sum(rows) / len(rows), value, rel_tol=1e-6, abs_tol=1e-9):
            low, high = mean_interval(rows, seed=seed)
            metrics[label] |= {"low": low, "high": high}
    return {"examples": len({sample["doc_id"] for sample in samples}), "metrics": metrics}


def _chance(config: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    if config.get("output_type") != "multiple_choice" or not samples:
        return {}
    return {"chance": sum(1 / len(sample["resps"]) for sample in samples) / len(samples)}


@contextmanager
def _data_of(tasks: Sequence[str]) -> Iterator[None]:
    """Turn what is raised for data that are not there into a :class:`UserError`."""
    try:
        yield
    except OSError as error:  # includes what datasets raises for a data set that is not there
        raise UserError(
            f"The data of {', '.join(tasks)} could not be read: {str(error).splitlines()[0]} Without a network "
            "use a task whose YAML names local files (dataset_path: json)."
        ) from error


@contextmanager
def _errors_only(*names: str) -> Iterator[None]:
    """Silence warnings of loggers: lm_eval warns about every model that is given as an object, and about every task
    with a function that reads its data."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
