"""``apt-trainer evaluate``: a saved model on the data of a recipe, on a text, or on tasks of lm-evaluation-harness."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from apt_trainer.cli.analyze import task_options
from apt_trainer.cli.benchmark import positive, write_result
from apt_trainer.cli.train import settings_help
from apt_trainer.errors import UserError
from apt_trainer.settings import DataSettings, ModelSettings
from apt_trainer.settings.choices import QUANTIZE

HELP = (
    "Evaluate a saved model and print its scores. On the data of a recipe (default: the one it was trained with) or "
    "of the settings below; a language model also on a text and on tasks of lm-evaluation-harness."
)
TAKES_SETTINGS = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "path", metavar="PATH", help="folder of a saved model, hub name or GGUF file; stands before any setting"
    )
    parser.add_argument("--config", metavar="FILE", help="recipe whose data are used")
    parser.add_argument("--output", metavar="FILE.json", help="write all numbers there; '-' prints them")
    text = parser.add_argument_group("perplexity on a text")
    text.add_argument("--perplexity", metavar="FILE", help="plain text file")
    text.add_argument("--window", type=positive, default=1024, metavar="N", help="tokens per window (default: 1024)")
    text.add_argument("--stride", type=positive, metavar="N", help="tokens between windows (default: no overlap)")
    text.add_argument("--max_tokens", type=positive, metavar="N", help="use only the first N tokens of the text")
    text.add_argument(
        "--start_token",
        action=argparse.BooleanOptionalAction,
        help="begin each window with it (default: where the tokenizer adds it to a text)",
    )
    tasks = parser.add_argument_group("tasks of lm-evaluation-harness (pip install 'apt-trainer[lm_eval]')")
    tasks.add_argument("--lm_eval", metavar="A,B", help="names of tasks, or paths of YAML files")
    tasks.add_argument("--task_path", metavar="DIR", help="folder with YAML files (default: those shipped)")
    tasks.add_argument("--limit", type=positive, metavar="N", help="use only the first N examples of each task")
    tasks.add_argument("--num_fewshot", type=int, metavar="N", help="examples before each question")
    both = parser.add_argument_group("text and tasks")
    both.add_argument("--batch_size", type=positive, default=1, metavar="N", help="sequences at a time (default: 1)")
    both.add_argument("--quantize", choices=QUANTIZE, help="weights of linear layers (default: as saved)")
    both.add_argument("--device", metavar="NAME", help="cpu, cuda … (default: the accelerator if there is one)")
    parser.epilog = settings_help((ModelSettings, DataSettings))


def run(args: argparse.Namespace, overrides: Sequence[str]) -> int:
    from apt_trainer.report.tables import scores_table
    from apt_trainer.settings.recipe import read_values

    given = read_values(None, overrides)
    of_model = {name: given[name] for name in given if name in {f.name for f in fields(ModelSettings)}}
    settings = ModelSettings(**of_model | {"model_name_or_path": args.path})
    language = bool(args.perplexity or args.lm_eval)
    if args.quantize and not language:
        raise UserError("quantize goes with perplexity and lm_eval. Give one of them.")
    found: dict[str, Any] = {"model": args.path}
    if args.config or len(given) > len(of_model) or not language:
        # a bare path loads in the type that the recipe says
        found["task"] = _task(settings if of_model else args.path, args.config, overrides)
    if language:
        found |= _language(args, settings)
    write_result(args.output, found, scores_table(found))
    return 0


def _task(model: str | ModelSettings, config: str | None, overrides: Sequence[str]) -> dict[str, float]:
    """Metrics on the data of a recipe."""
    from apt_trainer.runs import run as runs
    from apt_trainer.settings.recipe import load_recipe

    with tempfile.TemporaryDirectory() as folder:  # evaluating leaves the recipe's output_dir alone
        words = ["--output_dir", folder, *overrides]
        return runs.evaluate(model, load_recipe(config, words) if config or overrides else None)


def _language(args: argparse.Namespace, settings: ModelSettings) -> dict[str, Any]:
    from apt_trainer.evaluate.saved import LanguageRequest, evaluate_language

    request = LanguageRequest(
        text=args.perplexity,
        window=args.window,
        stride=args.stride,
        max_tokens=args.max_tokens,
        start_token=args.start_token,
        device=args.device,
        quantize=args.quantize,
        **task_options(args),
    )
    return evaluate_language(settings, request)
