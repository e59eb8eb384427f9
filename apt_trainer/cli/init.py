"""``apt-trainer init``: a first recipe for a model and a file of one's own."""

from __future__ import annotations

import argparse
import logging
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from apt_trainer.cli.train import settings_help
from apt_trainer.settings import DataSettings, ModelSettings

HELP = "Look at data, guess what is to be learnt from them, and write a recipe with sensible values for their size."
TAKES_SETTINGS = True

_DATA = (
    "Say where the data are with --train_file FILE (csv, tsv, json, jsonl, parquet, txt, or a folder of texts with a "
    "sub-folder for each label) or --dataset_name NAME. Any other key of a recipe is taken over, and what the data "
    "are is guessed with it: --label_column, --task …"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", required=True, metavar="MODEL", help="hub name, folder, package:NAME/folder or GGUF file"
    )
    parser.add_argument("--output", metavar="FILE.yaml", help="write the recipe there (default: print it)")
    parser.epilog = f"{textwrap.fill(_DATA, 119)}\n\n{settings_help((ModelSettings, DataSettings))}"


def run(args: argparse.Namespace, overrides: Sequence[str]) -> int:
    from apt_trainer.errors import UserError
    from apt_trainer.libraries.quiet import level_of
    from apt_trainer.runs.first_recipe import first_recipe, write_new
    from apt_trainer.settings.recipe import read_values

    if args.output is not None and Path(args.output).exists():
        raise UserError(f"{args.output} is there already and is not written over. Choose another --output.")
    given = read_values(None, overrides)
    of_model = {f.name: given.pop(f.name) for f in fields(ModelSettings) if f.name in given}
    model = ModelSettings(**of_model | {"model_name_or_path": args.model})
    with level_of("apt_trainer.tasks", logging.ERROR):  # what is odd about the data, the checks tell
        recipe = first_recipe(model, given, args.output)
    if args.output is None:
        print(recipe.text)
    else:
        write_new(Path(args.output), recipe.text)
    said = [f"wrote {args.output}"] if args.output else []
    said += ["", "Please check:", *(f"- {check}" for check in recipe.checks), ""] if recipe.checks else []
    print("\n".join(said), file=sys.stderr, flush=True)
    with level_of("apt_trainer.tasks", logging.ERROR):
        print(_planned(args.output, recipe.text), file=sys.stderr)
    return 0


def _planned(output: str | None, text: str) -> str:
    """What ``plan`` says of the recipe; raises :class:`UserError` where it refuses it."""
    import tempfile

    from apt_trainer.errors import UserError
    from apt_trainer.runs import dry_run
    from apt_trainer.settings.recipe import load_recipe

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "recipe.yaml"
        file.write_text(text, encoding="utf-8")
        try:
            planned = dry_run.plan(load_recipe(str(file)))
        except UserError as error:
            told = str(error).removeprefix(f"{file}: ")
            what = "The recipe is written, but a run of it" if output else "This recipe"
            raise UserError(f"{what} would not start yet. {told}") from error
    sizes, _, _ = planned.partition("\n\n")
    if output is None:
        return f"{sizes}\n\nNothing is written. To keep the recipe: add --output my.yaml"
    return f"{sizes}\n\napt-trainer plan  --config {output}\napt-trainer train --config {output}"
