"""``apt-trainer drop``: a model without some of its attentions, heads, feed-forwards or layers."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from apt_trainer.cli.analyze import (
    add_data_arguments,
    add_held_out_arguments,
    add_model_arguments,
    add_output_arguments,
    add_policy_argument,
    data_request,
    held_out_options,
    progress,
)
from apt_trainer.cli.benchmark import positive
from apt_trainer.settings.choices import QUANTIZE
from apt_trainer.studies.choices import BASELINES, COSTS, FRACTIONS, KINDS, METHODS, STRATEGIES

if TYPE_CHECKING:
    from apt_trainer.studies.drop import DropRequest

HELP = (
    "Drop attentions, heads, feed-forwards or layers of a model and save the smaller one; prints the loss before and "
    "after."
)
TAKES_SETTINGS = False


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument("--kind", choices=KINDS, default="attention", help="what to drop (default: attention)")
    amount = parser.add_mutually_exclusive_group(required=True)
    amount.add_argument("--count", type=positive, metavar="N", help="units to drop")
    amount.add_argument("--fraction", type=float, metavar="F", help="share of all blocks to drop, 0 to 1")
    amount.add_argument(
        "--drop_list", metavar="FILE", help="JSON with the units: a drop list, a drop report or a config of LLM-Drop"
    )
    parser.add_argument(
        "--fraction_of", choices=FRACTIONS, default="params", help="what --fraction is a share of (default: params)"
    )
    parser.add_argument("--method", choices=METHODS, default="cosine", help="score (default: cosine; not for heads)")
    parser.add_argument(
        "--cost", choices=COSTS, default="params", help="what nri divides relative impact by (default: params)"
    )
    parser.add_argument(
        "--baseline", choices=BASELINES, default="current", help="what nri compares with (default: current)"
    )
    parser.add_argument(
        "--scores", metavar="FILE", help="scores.json of analyze: its losses are not measured again by nri"
    )
    parser.add_argument(
        "--strategy", choices=STRATEGIES, default="one_shot", help="rank once, or anew after each drop (one_shot)"
    )
    parser.add_argument(
        "--protect", type=int, nargs="+", default=[], metavar="LAYER", help="layers that stay; -1 is the last"
    )
    add_policy_argument(parser)
    add_data_arguments(parser, required=False)
    add_held_out_arguments(parser)
    parser.add_argument("--speed", action="store_true", help="time both models side by side; with tasks also SDR")
    parser.add_argument("--quantize", choices=QUANTIZE, help="measure the smaller model with weights of this form")
    parser.add_argument(
        "--full", metavar="FILE", help="metrics.json of an earlier drop: the full model is not measured again"
    )
    add_output_arguments(parser, "folder of the model, drop_report.json, drop_list.json and metrics.json")


def check(args: argparse.Namespace) -> None:
    """Raise :class:`~apt_trainer.errors.UserError` for what cannot work whatever the model."""
    _request(args).check(args.data is not None)


def _request(args: argparse.Namespace) -> DropRequest:
    from apt_trainer.studies.drop import DropRequest

    return DropRequest(
        kind=args.kind,
        count=args.count,
        fraction=args.fraction,
        fraction_of=args.fraction_of,
        method=args.method,
        cost=args.cost,
        baseline=args.baseline,
        strategy=args.strategy,
        protect=args.protect,
        drop_list=args.drop_list,
        scores=args.scores,
        seed=args.seed,
        post_norm_policy=args.post_norm_policy,
    )


def run(args: argparse.Namespace, overrides: Sequence[str]) -> int:
    from apt_trainer.report.tables import held_out_table
    from apt_trainer.settings import ModelSettings
    from apt_trainer.studies.drop import drop_units, report_text
    from apt_trainer.studies.held_out import HeldOutRequest

    data = None if args.data is None else data_request(args)
    held_out = HeldOutRequest(**held_out_options(args), speed=args.speed, quantize=args.quantize, full=args.full)
    report = drop_units(
        ModelSettings(args.model, dtype=args.dtype),
        _request(args),
        args.output,
        data=data,
        device=args.device,
        resume=args.resume,
        watch=progress,
        held_out=held_out,
    )
    print(report_text(report))
    if held_out.asks:
        print(held_out_table(report["metrics"]))
    for warning in report["warnings"]:
        print(f"warning: {warning}", file=sys.stderr)
    print(f"wrote the model to {args.output}")
    return 0
