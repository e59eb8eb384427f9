"""``apt-trainer vocabulary``: a model without the tokens that some texts do not have."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

from apt_trainer.cli.analyze import DTYPES
from apt_trainer.cli.benchmark import positive

HELP = "Take the tokens out of a model and its tokenizer that your texts do not have; any text can still be encoded."
TAKES_SETTINGS = False


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, metavar="MODEL", help="folder, hub name or GGUF file, pruned or not")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="type of the weights (default: as saved)")
    parser.add_argument(
        "--data", required=True, nargs="+", metavar="FILE", help="texts: txt, or all columns of text of json, csv …"
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="folder to make")
    parser.add_argument("--size", type=positive, metavar="N", help="at most so many tokens, the most frequent ones")
    parser.add_argument(
        "--other", nargs="+", default=[], metavar="FILE", help="other texts, to see how many more tokens they take"
    )


def run(args: argparse.Namespace, overrides: Sequence[str]) -> int:
    from pathlib import Path

    from apt_trainer.runs.vocabulary import cut_model
    from apt_trainer.settings import ModelSettings

    record = cut_model(
        ModelSettings(args.model, dtype=args.dtype), args.data, Path(args.output), args.size, args.other
    )
    print(told(args.output, record))
    return 0


def told(output: str, record: Mapping[str, Any]) -> str:
    """What was written to ``output``."""
    from apt_trainer.report.tables import format_bytes, format_count

    lines = [
        f"{output}: {record['tokens']:,} of {record['tokens_before']:,} tokens, "
        f"{format_count(record['parameters'])} of {format_count(record['parameters_before'])} parameters, "
        f"{format_bytes(record['bytes'])} of {format_bytes(record['bytes_before'])}"
    ]
    for name, texts in (("data", "the data"), ("other", "the other texts")):
        if f"tokens_per_word_{name}" in record:
            before, after = record[f"tokens_per_word_{name}_before"], record[f"tokens_per_word_{name}"]
            lines.append(f"tokens per word of {texts}: {after:.3f} (before {before:.3f})")
    return "\n".join(lines)
