"""``apt-trainer train``: train from a recipe, in this process or through accelerate."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from apt_trainer.errors import UserError
from apt_trainer.settings import SETTING_GROUPS

HELP = "Train from a recipe: fine-tune and prune, then save the smaller model."
TAKES_SETTINGS = True

SETTINGS_INTRO = (
    "Every setting can stand in the recipe as 'key: value' and be overridden as --key value; --key null unsets it, "
    "--key a b c gives a list. The ones of this package follow, with their defaults. Every key of transformers' "
    "TrainingArguments is accepted too, for example --output_dir, --learning_rate, --num_train_epochs, --bf16, --seed."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="recipe: a YAML file with the settings below, or the name of one that comes with apt_trainer: "
        "quickstart, minilm/sst2 …",
    )
    parser.add_argument(
        "--accelerate_config",
        metavar="NAME_OR_PATH",
        help="start through accelerate: single_gpu; ddp, zero1, zero2, zero3, zero3_offload or fsdp2 (experimental), "
        "all of them also with _cpu; or the path of an accelerate config file",
    )
    parser.add_argument(
        "--num_processes", type=int, metavar="N", help="number of processes; needs --accelerate_config"
    )
    parser.epilog = settings_help(SETTING_GROUPS)


def run(args: argparse.Namespace, overrides: Sequence[str]) -> int:
    from apt_trainer.cli import EXIT_INTERRUPTED
    from apt_trainer.cli.launch import check_world_size, launch

    if args.accelerate_config is not None:
        from apt_trainer.settings.packages import check_packages
        from apt_trainer.settings.recipe import check_recipe

        check_packages(check_recipe(args.config, overrides))  # a mistake is told once, before any process starts
        config = ["--config", args.config] if args.config else []
        return launch(args.accelerate_config, args.num_processes, ["train", *config, *overrides])
    if args.num_processes is not None:
        raise UserError("--num_processes needs --accelerate_config, for example: --accelerate_config ddp")

    from apt_trainer.runs import run as runs
    from apt_trainer.settings.recipe import load_recipe
    from apt_trainer.training.termination import EXIT_TERMINATED, Terminated, ending_cleanly

    recipe = load_recipe(args.config, overrides)
    check_world_size(recipe.training.world_size)
    chief = os.environ.get("RANK", "0") == "0"
    try:
        with ending_cleanly():
            metrics = runs.train(recipe)
    except Terminated as ended:
        go_on = "go on with resume_from_checkpoint: true"
        print(f"error: terminated after a checkpoint at step {ended.step}; {go_on}", file=sys.stderr)
        return EXIT_TERMINATED
    except (KeyboardInterrupt, SystemExit) as ended:
        if chief:
            print(f"error: {ended_text(str(recipe.training.output_dir))}", file=sys.stderr)
        return EXIT_INTERRUPTED if isinstance(ended, KeyboardInterrupt) else int(ended.code or 0)
    if chief:
        print(result_text(metrics, str(recipe.training.output_dir)))
    return 0


def ended_text(path: str) -> str:
    """What is left of a run that was told to end, and how to go on."""
    from apt_trainer.training.checkpoints.whole import GOES_ON

    if (Path(path) / "config.json").is_file():
        return f"ended after training: {path} holds the finished model, but not all that is measured of it"
    return f"ended before the model was finished. Run it again with {GOES_ON}"


def result_text(metrics: Mapping[str, Any], path: str) -> str:
    """What a run ends with: dense against pruned, and how to load the result."""
    from apt_trainer.report.tables import comparison_table, exports_table
    from apt_trainer.store.events import PREDICTIONS_FILE

    exports = ""
    if metrics.get("exports"):
        exports = (
            f"\n{exports_table(metrics)}\n\nSpeeds are multiples of the dense model's in PyTorch on the CPU, all in "
            f"turns. Exports are in {path}/export.\n"
        )
    example = ""
    if (Path(path) / PREDICTIONS_FILE).is_file():
        of_row = json.loads((Path(path) / PREDICTIONS_FILE).read_text(encoding="utf-8"))["example"]
        text = textwrap.shorten(of_row["text"], 90, placeholder=" …")
        example = f"""
For example, the first row of the {metrics["evaluated_on"]} data: "{text}"
The model says {of_row["prediction"]}, and right is {of_row["label"]}. Of a text of your own:

    apt-trainer predict {path} --text "..."
"""
    direction = "" if metrics.get("greater_is_better", True) else "; lower is better"
    return f"""
{comparison_table(metrics)}
{exports}
{metrics["metric_name"]} is measured on the {metrics["evaluated_on"]} data{direction}.
All numbers are in {path}/metrics.json, the picture is {path}/run.png. As a page:

    apt-trainer report {path} --output {path}/report.html
{example}
Load the result:

    {loading_code(path)}
"""


def loading_code(path: str) -> str:
    """Python that loads the model saved in ``path``, with the head it has there."""
    from apt_trainer.models.modeling_apt import PREFIX

    saved = json.loads((Path(path) / "config.json").read_text(encoding="utf-8"))
    if saved["model_type"].startswith(PREFIX):
        return f"from apt_trainer import load_pruned\n    model = load_pruned({path!r})"
    name = saved["architectures"][0]
    return f"from transformers import {name}\n    model = {name}.from_pretrained({path!r})"


def settings_help(groups: Sequence[type]) -> str:
    """The settings of these dataclasses with their defaults and help texts, and how to give them."""
    width, indent = min(shutil.get_terminal_size().columns, 119), " " * 6
    lines = textwrap.wrap(SETTINGS_INTRO, width)
    for group in groups:
        lines += ["", *textwrap.wrap(f"{group.__name__}: {group.__doc__}", width)]
        for setting in fields(group):
            default = setting.default if setting.default_factory is MISSING else setting.default_factory()
            lines.append(f"  --{setting.name} {_as_words(default)}")
            lines += textwrap.wrap(setting.metadata["help"], width, initial_indent=indent, subsequent_indent=indent)
    return "\n".join(lines).replace("%", "%%")


def _as_words(default: Any) -> str:
    if isinstance(default, list):
        return " ".join(map(str, default))
    return default if isinstance(default, str) else json.dumps(default)
