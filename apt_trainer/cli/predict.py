"""``apt-trainer predict``: what a finished model says of texts, one JSON line each."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path

from apt_trainer.cli.benchmark import positive
from apt_trainer.cli.train import settings_help
from apt_trainer.errors import UserError
from apt_trainer.settings import DataSettings, ModelSettings

HELP = (
    "Let a finished model, pruned or not, tell what it thinks of texts: labels with probabilities, numbers, tags, "
    "answers, embeddings, or what it writes; or of images: labels. One JSON line each."
)
TAKES_SETTINGS = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "path", metavar="PATH", help="folder of a saved model, hub name or GGUF file; stands before any setting"
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--text", nargs="+", metavar="TEXT", help="one text or several; for answers the question")
    what.add_argument(
        "--file",
        metavar="FILE",
        help="csv, tsv, json, jsonl or parquet file, or txt: a text a line; "
        "of a model of images an image file, or a folder of them",
    )
    parser.add_argument("--text_pair", nargs="+", metavar="TEXT", help="as many second texts; for answers the context")
    parser.add_argument("--output", metavar="FILE.jsonl", help="write the lines there (default: print them)")
    parser.add_argument("--batch_size", type=positive, default=32, metavar="N", help="texts at a time (default: 32)")
    parser.add_argument(
        "--max_new_tokens", type=positive, default=128, metavar="N", help="most tokens that are written (default: 128)"
    )
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda … (default: the accelerator if there is one)")
    parser.epilog = settings_help((ModelSettings, DataSettings))


def run(args: argparse.Namespace, overrides: Sequence[str]) -> int:
    from apt_trainer.evaluate.predictions import PredictOptions, Predictor
    from apt_trainer.settings.recipe import read_values
    from apt_trainer.store.events import write_lines

    if args.text_pair is not None and args.text is None:
        raise UserError("--text_pair goes with --text; in a file name the column: --text_pair_column NAME.")
    given = read_values(None, overrides)
    of_model = {f.name: given.pop(f.name) for f in fields(ModelSettings) if f.name in given}
    foreign = [name for name in given if name not in {f.name for f in fields(DataSettings)}]
    if foreign:
        raise UserError(f"{foreign[0]} says nothing about model or data, which is all that predict can be told.")
    settings = ModelSettings(**{"dtype": "auto"} | of_model | {"model_name_or_path": args.path})
    predictor = Predictor(settings, given, PredictOptions(args.batch_size, args.device, args.max_new_tokens))
    rows = predictor.given.read(args.file) if args.file else predictor.given.rows_of_texts(args.text, args.text_pair)

    def lines() -> Iterator[str]:
        for prediction in predictor.predict(rows):
            yield json.dumps(prediction, ensure_ascii=False)

    if args.output is None:
        for line in lines():
            print(line, flush=True)
        return 0
    write_lines(Path(args.output), lines())
    print(f"wrote {args.output}: {len(rows):,} predictions")
    return 0
