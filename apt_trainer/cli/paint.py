"""``apt-trainer paint``: the layers of a frozen model in other orders, looped, or side by side."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from apt_trainer.cli.analyze import (
    add_data_arguments,
    add_model_arguments,
    add_task_arguments,
    data_request,
    progress,
    task_options,
)
from apt_trainer.cli.benchmark import positive
from apt_trainer.errors import UserError
from apt_trainer.studies.named_plans import METHODS

HELP = (
    "Run the layers of a frozen model by other plans (skipped, reversed, shuffled, side by side …), measure each, and "
    "draw the results; or save a model that keeps one plan."
)
TAKES_SETTINGS = False


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument("--output", required=True, metavar="DIR", help="folder of results, tables and figures")
    parser.add_argument("--resume", action="store_true", help="go on with a sweep, also with more plans")
    parser.add_argument("--keep", metavar="PLAN.json", help="no sweep: save the model with this plan to --output")
    plans = parser.add_argument_group("plans")
    plans.add_argument("--methods", nargs="*", choices=METHODS, default=METHODS, metavar="M", help=_methods_help())
    plans.add_argument(
        "--starts",
        type=int,
        nargs="+",
        metavar="S",
        help="layers 0 to S and the last S stay as they are (default: every S)",
    )
    plans.add_argument("--seeds", type=positive, default=3, metavar="N", help="random orders per start (default: 3)")
    plans.add_argument(
        "--loops",
        type=positive,
        nargs="+",
        default=[3],
        metavar="N",
        help="how often the looped parallel middle runs (default: 3)",
    )
    plans.add_argument("--plans", nargs="+", default=[], metavar="PLAN.json", help="further plans, in files")
    add_data_arguments(parser, required=False)
    add_task_arguments(parser.add_argument_group("tasks of lm-evaluation-harness, an extra: lm_eval"))


def _methods_help() -> str:
    return f"any of {', '.join(METHODS)}, or none (default: all)"


def check(args: argparse.Namespace) -> None:
    """Raise :class:`~apt_trainer.errors.UserError` for what cannot work whatever the model."""
    if args.keep is not None:
        raise UserError("keep saves a model and measures nothing to compare. Leave it out.")
    if args.data is None and not args.lm_eval:
        raise UserError("There is nothing to measure plans on. Give data, lm_eval, or both.")


def run(args: argparse.Namespace, overrides: Sequence[str]) -> int:
    from apt_trainer.report.painting import paint_markdown
    from apt_trainer.settings import ModelSettings
    from apt_trainer.store.events import METRICS_FILE
    from apt_trainer.studies.paint import RESULTS_FILE, SUMMARY_FILE, TABLE_FILE, PaintRequest, keep_plan, paint_sweep

    settings = ModelSettings(args.model, dtype=args.dtype)
    data = None if args.data is None else data_request(args)
    if args.keep is not None:
        kept = keep_plan(settings, args.keep, args.output, data, args.device)
        print(f"plan         {kept['plan']}")
        if "loss_after" in kept:
            print(f"{kept['loss_name']:<12} {kept['loss_before']:.4g} → {kept['loss_after']:.4g}")
        print(f"wrote the model to {args.output}")
        return 0
    request = PaintRequest(
        methods=args.methods,
        starts=args.starts,
        seeds=args.seeds,
        loops=args.loops,
        plans=args.plans,
        **task_options(args),
    )
    found = paint_sweep(settings, request, args.output, data, args.device, args.resume, progress)
    print(paint_markdown(found))
    for warning in found["warnings"]:
        print(f"warning: {warning}", file=sys.stderr)
    names = ", ".join([RESULTS_FILE, SUMMARY_FILE, TABLE_FILE, METRICS_FILE, *found["figures"]])
    print(f"wrote {names} to {args.output}")
    return 0
