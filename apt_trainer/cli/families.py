"""``apt-trainer families``: which model types are supported, and what each can lose."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

HELP = "List the model types that can be pruned, and what each can lose."
TAKES_SETTINGS = False


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """No arguments."""


def run(args: argparse.Namespace, overrides: Sequence[str]) -> int:
    from apt_trainer.models import FAMILIES
    from apt_trainer.models.overview import overview
    from apt_trainer.report.tables import markdown_table

    rows = [{key: value or None for key, value in row.items()} for row in overview(FAMILIES)]
    print(markdown_table(rows, [(key, key.replace("_", " "), None) for key in rows[0]]))
    print(
        f"\n{len(rows)} model types. Hidden dimensions go in all layers at once; a sublayer goes with its last unit."
    )
    return 0
