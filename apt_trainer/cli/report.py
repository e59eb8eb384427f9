"""``apt-trainer report``: runs side by side, in Markdown, CSV or as an HTML page with pictures; one run as a page."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from apt_trainer.errors import UserError

HELP = (
    "Compare finished runs: mean and spread over seeds, and change against a baseline. With --output FILE.html a "
    "single run gets a page: how much smaller, faster and worse, and on which inputs it differs from the dense model."
)
TAKES_SETTINGS = False


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", metavar="RUN", nargs="+", help="folder of a study or of a finished run")
    parser.add_argument("--output", metavar="FILE", help="write FILE.md, FILE.csv or FILE.html (default: print)")
    parser.add_argument("--baseline", metavar="NAME", help="variant that the others are compared with")


def run(args: argparse.Namespace, overrides: Sequence[str]) -> int:
    from apt_trainer.report.comparison import compare, is_training_run, read_results, to_csv, to_markdown
    from apt_trainer.store.events import write_text

    output, suffix = Path(args.output or "-.md"), Path(args.output or "-.md").suffix
    if suffix not in (".md", ".csv", ".html"):
        raise UserError(f"--output={args.output!r} must end in .md, .csv or .html.")
    records = read_results(args.runs)
    names, comparison = [Path(path).resolve().name for path in args.runs], compare(records, args.baseline)
    first = Path(args.runs[0])
    if suffix == ".html" and len(names) == 1 and is_training_run(first):
        from apt_trainer.report.run_page import run_page

        text = run_page(first, names[0])
    elif suffix == ".html":
        from apt_trainer.report.html import to_html

        text = to_html(comparison, records, " + ".join(names))
    else:
        text = to_csv(comparison) if suffix == ".csv" else to_markdown(comparison) + "\n"
    if args.output is None:
        print(text, end="")
        return 0
    write_text(output, text)
    print(f"wrote {output}")
    return 0
