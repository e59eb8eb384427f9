"""``apt-trainer evaluate``: the metrics of a saved model on the data of a recipe."""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence

from apt_trainer.cli.train import settings_help
from apt_trainer.settings import DataSettings

HELP = "Evaluate a saved model; print its metrics as JSON. The data come from a recipe or from the settings below."
TAKES_SETTINGS = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="PATH", help="folder of a saved model; stands before any setting")
    parser.add_argument("--config", metavar="FILE", help="recipe whose data are used")
    parser.epilog = settings_help((DataSettings,))


def run(args: argparse.Namespace, overrides: Sequence[str]) -> int:
    from apt_trainer import run as runs
    from apt_trainer.recipe import load_recipe

    with tempfile.TemporaryDirectory() as folder:  # evaluating leaves the recipe's output_dir alone
        words = ["--output_dir", folder, *overrides]
        recipe = load_recipe(args.config, words) if args.config or overrides else None
        metrics = runs.evaluate(args.path, recipe)
    print(json.dumps(metrics, indent=2, default=float))
    return 0
