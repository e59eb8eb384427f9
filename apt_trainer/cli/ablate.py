"""``apt-trainer ablate``: run the variants and seeds of a study, and print the table."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from apt_trainer.cli import drop, paint

if TYPE_CHECKING:
    from apt_trainer.studies.ablation.commands import Command

HELP = "Run a study: variants times seeds, side by side; continues where it was stopped. Prints a table."
TAKES_SETTINGS = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--study",
        metavar="FILE",
        required=True,
        help="YAML: command (train, drop or paint), base, output_dir, seeds, common, variants, baseline, metrics",
    )
    parser.add_argument(
        "--jobs", type=int, default=1, metavar="N", help="runs at a time (default: 1); more distort each other's times"
    )
    parser.add_argument("--output_dir", metavar="DIR", help="overrides that of the study")
    parser.add_argument("--variants", nargs="+", metavar="NAME", help="run these and what they need (default: all)")
    parser.add_argument("--seeds", type=int, nargs="+", metavar="SEED", help="override those of the study")


def run(args: argparse.Namespace, overrides: Sequence[str]) -> int:
    from apt_trainer.report.comparison import compare, read_results, to_markdown
    from apt_trainer.store.events import RESULTS_FILE
    from apt_trainer.studies.ablation.runner import run_study
    from apt_trainer.studies.ablation.study import read_study

    study = read_study(args.study, args.output_dir, args.seeds, overrides, study_commands())
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, frame: sys.exit(128 + number))  # through the clean-up, as for SIGINT
    failures = run_study(study, args.jobs, lambda line: print(line, file=sys.stderr, flush=True), args.variants)
    if (study.output_dir / RESULTS_FILE).is_file():
        print(to_markdown(compare(read_results([str(study.output_dir)]))))
    for name, log in failures.items():
        print(f"\nfailed: {name}\n{log}", file=sys.stderr)
    return 1 if failures else 0


def study_commands() -> list[Command]:
    """Verbs that a study can run, the default first."""
    from apt_trainer.studies.ablation.commands import OptionsCommand
    from apt_trainer.studies.ablation.study import TRAIN
    from apt_trainer.studies.inputs import PROGRESS_FILE
    from apt_trainer.studies.paint import RESULTS_FILE

    return [
        TRAIN,
        OptionsCommand("drop", drop.add_arguments, drop.check, PROGRESS_FILE),
        OptionsCommand("paint", paint.add_arguments, paint.check, RESULTS_FILE),
    ]
