"""``apt-trainer schema``: JSON schemas by which editors complete and check recipes and studies."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HELP = "Write the JSON schemas of recipes and studies, by which an editor completes and checks them."
TAKES_SETTINGS = False

KINDS = ("recipe", "study", "drop", "paint")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "kind",
        nargs="?",
        choices=KINDS,
        default="recipe",
        help="what to print: a recipe (default), a study, or the options that a study of drop or paint starts from",
    )
    parser.add_argument("--output", metavar="DIR", help="write all of them there instead")
    parser.epilog = (
        "An editor with the YAML language server reads them where the first line of a file names one:\n"
        "    # yaml-language-server: $schema=DIR/recipe.json\n"
        "init writes that line; the schemas of all keys come with the package."
    )


def run(args: argparse.Namespace, overrides: Sequence[str]) -> int:
    from apt_trainer.settings.schema import as_text
    from apt_trainer.store.events import write_text

    made = schemas()
    if args.output is None:
        print(as_text(made[args.kind]), end="")
        return 0
    for kind, schema in made.items():
        write_text(Path(args.output) / f"{kind}.json", as_text(schema))
    print(f"wrote {', '.join(f'{kind}.json' for kind in made)} to {args.output}")
    return 0


def schemas() -> dict[str, dict[str, Any]]:
    """All schemas by the names of their files, which refer to each other."""
    from apt_trainer.cli.ablate import study_commands
    from apt_trainer.settings.schema import recipe_schema
    from apt_trainer.studies.ablation.commands import OptionsCommand
    from apt_trainer.studies.ablation.schema import options_schema, study_schema

    commands = study_commands()
    options = {command.name: options_schema(command) for command in commands if isinstance(command, OptionsCommand)}
    return {"recipe": recipe_schema(), "study": study_schema(commands), **options}
