"""``apt-trainer plan``: a dry run that says what ``train`` would do, without reading weights."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from apt_trainer.cli.train import settings_help
from apt_trainer.settings import SETTING_GROUPS

HELP = "Check a recipe and print what training would do: sizes, schedule, costs. Fails on any error in the recipe."
TAKES_SETTINGS = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="recipe: a YAML file with the settings below, or the name of one that comes with apt_trainer: "
        "quickstart, minilm/sst2 …",
    )
    parser.add_argument(
        "--processes", type=int, default=1, metavar="N", help="say what each of N processes would hold of the weights"
    )
    parser.epilog = settings_help(SETTING_GROUPS)


def run(args: argparse.Namespace, overrides: Sequence[str]) -> int:
    from apt_trainer.runs import dry_run
    from apt_trainer.settings.recipe import load_recipe

    print(dry_run.plan(load_recipe(args.config, overrides), args.processes))
    return 0
