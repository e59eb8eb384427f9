"""The command line: ``apt-trainer VERB ...``, one file per verb.

A verb is a module with ``HELP``, ``TAKES_SETTINGS``, ``add_arguments(parser)`` and ``run(args, overrides)``, which
returns the exit code; adding one means one file and one line in :data:`VERBS`. Verbs only parse, call and print, and
import what is heavy inside functions so that ``--help`` answers at once. Not for logic that a Python user needs too.
"""

from __future__ import annotations

import argparse
import errno
import importlib
import sys
from collections.abc import Sequence
from typing import Any

from apt_trainer import __version__
from apt_trainer.cli.completion import SHELLS, PrintCompletion
from apt_trainer.errors import RunError, UserError
from apt_trainer.libraries.quiet import quiet
from apt_trainer.libraries.versions import check_versions

VERBS = {
    "init": "apt_trainer.cli.init",
    "train": "apt_trainer.cli.train",
    "plan": "apt_trainer.cli.plan",
    "predict": "apt_trainer.cli.predict",
    "chat": "apt_trainer.cli.chat",
    "evaluate": "apt_trainer.cli.evaluate",
    "benchmark": "apt_trainer.cli.benchmark",
    "export": "apt_trainer.cli.export",
    "vocabulary": "apt_trainer.cli.vocabulary",
    "analyze": "apt_trainer.cli.analyze",
    "drop": "apt_trainer.cli.drop",
    "curve": "apt_trainer.cli.curve",
    "paint": "apt_trainer.cli.paint",
    "ablate": "apt_trainer.cli.ablate",
    "report": "apt_trainer.cli.report",
    "schema": "apt_trainer.cli.schema",
    "families": "apt_trainer.cli.families",
    "env": "apt_trainer.cli.env",
}

_WITHOUT_MODELS = ("env", "report")
"""Verbs that answer whatever versions of other libraries are installed."""

EXIT_FAILED = 1
EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130  # what shells report for SIGINT


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and return the exit code: 0, 1 for a run that cannot go on, 2 for a user's mistake, 130 or 143 on
    signals."""
    verbs = {name: importlib.import_module(path) for name, path in VERBS.items()}
    parser = _parser(verbs)
    try:
        args, overrides = parser.parse_known_args(argv)
        verb = verbs[args.verb]
        if overrides and not verb.TAKES_SETTINGS:
            parser.error(f"{args.verb}: unrecognized arguments: {' '.join(overrides)}")
        with quiet(sys.argv[1:] if argv is None else argv):
            if args.verb not in _WITHOUT_MODELS:
                check_versions()
            return int(verb.run(args, overrides))
    except UserError as error:
        return _fail(str(error), EXIT_USER_ERROR)
    except RunError as error:
        return _fail(str(error), EXIT_FAILED)
    except KeyboardInterrupt:
        return _fail("interrupted", EXIT_INTERRUPTED)
    except _saving_errors() as error:
        if not _is_disk_full(error):
            raise
        path = getattr(error, "filename", None)
        where = f" ({path})" if path else ""
        return _fail(f"no space left on device{where}. Free some, or choose another --output_dir.", EXIT_FAILED)


def _parser(verbs: dict[str, Any]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="apt-trainer", description="Fine-tune a transformer while adaptively pruning it.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"apt-trainer {__version__}")
    parsers: dict[str, argparse.ArgumentParser] = {}
    parser.add_argument(
        "--print-completion",
        action=PrintCompletion,
        choices=SHELLS,
        commands=parsers,
        help="print what lets a shell complete verbs and keys (pip install 'apt-trainer[completion]')",
    )
    commands = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for name, module in verbs.items():
        command = parsers[name] = commands.add_parser(
            name,
            help=module.HELP,
            description=module.HELP,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(command)
    return parser


def _fail(message: str, code: int) -> int:
    print(f"error: {message}", file=sys.stderr)
    return code


def _saving_errors() -> tuple[type[Exception], ...]:
    """What writing a file can raise; looked up only after something was raised."""
    from safetensors import SafetensorError

    return OSError, SafetensorError


def _is_disk_full(error: Exception) -> bool:
    # safetensors raises its own type, with the number in the text only
    return getattr(error, "errno", None) == errno.ENOSPC or f"os error {errno.ENOSPC})" in str(error)
