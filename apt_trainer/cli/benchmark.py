"""``apt-trainer benchmark``: a saved model against its dense original."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

HELP = "Measure a saved model against a dense one: parameters, FLOPs, latency, memory."
TAKES_SETTINGS = False


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="PATH", help="folder of a saved model")
    parser.add_argument(
        "--baseline", metavar="MODEL", help="model to compare with (default: the dense shape of the pruned one)"
    )
    parser.add_argument(
        "--batch_sizes", type=_positive, nargs="+", default=[1, 32], metavar="N", help="batch sizes (default: 1 32)"
    )
    parser.add_argument(
        "--length", type=_positive, default=128, metavar="N", help="sequence length in tokens (default: 128)"
    )


def run(args: argparse.Namespace, overrides: Sequence[str]) -> int:
    from apt_trainer import run as runs
    from apt_trainer.report.tables import comparison_table

    metrics = runs.benchmark(args.path, baseline=args.baseline, batch_sizes=args.batch_sizes, length=args.length)
    print(comparison_table(metrics))
    return 0


def _positive(word: str) -> int:
    number = int(word)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{word} is not positive")
    return number
