"""``apt-trainer curve``: the harm of dropping more and more units, by kind of unit and by ranking."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

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
from apt_trainer.studies.choices import COSTS, CURVE_KINDS, DEFAULT_CURVE_KINDS, METHODS

HELP = "Drop more and more attentions, heads, feed-forwards or layers by several rankings, measure and draw each drop."
TAKES_SETTINGS = False
DEFAULT = ("cosine", "nri:params", "reverse", "random")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    add_data_arguments(parser, required=True)
    drops = parser.add_argument_group("drops")
    drops.add_argument(
        "--kinds", nargs="+", choices=CURVE_KINDS, default=DEFAULT_CURVE_KINDS, help="default: all but heads"
    )
    drops.add_argument(
        "--rankings",
        nargs="+",
        default=DEFAULT,
        metavar="METHOD[:COST][:iterative]",
        help=f"any of {', '.join(METHODS)}; costs of nri: {', '.join(COSTS)}; cosine ranks no heads "
        f"(default: {' '.join(DEFAULT)})",
    )
    drops.add_argument("--counts", type=positive, nargs="+", default=[1, 2, 4, 8], metavar="N", help="units to drop")
    drops.add_argument(
        "--head_counts", type=positive, nargs="+", metavar="N", help="heads to drop, of kind heads (default: --counts)"
    )
    drops.add_argument("--seeds", type=positive, default=3, metavar="N", help="random orders (default: 3)")
    drops.add_argument(
        "--protect", type=int, nargs="+", default=[], metavar="LAYER", help="layers that stay; -1 is the last"
    )
    add_policy_argument(drops)
    add_held_out_arguments(parser, required=True)
    measures = parser.add_argument_group("what else is measured")
    measures.add_argument(
        "--speed", action="store_true", help="speed of each smaller model beside the full one, and SDR"
    )
    measures.add_argument(
        "--task_counts",
        type=positive,
        nargs="+",
        metavar="N",
        help="where tasks run and speed is timed (default: all counts)",
    )
    add_output_arguments(parser, "folder of curve.json, curve.md, curve.png and results.jsonl")


def run(args: argparse.Namespace, overrides: Sequence[str]) -> int:
    from apt_trainer.report.curve import curve_markdown
    from apt_trainer.settings import ModelSettings
    from apt_trainer.studies.curve import RESULTS_FILE, SUMMARY_FILE, TABLE_FILE, CurveRequest, measure_curves

    options = held_out_options(args)
    test = options.pop("test")
    request = CurveRequest(
        kinds=args.kinds,
        rankings=args.rankings,
        counts=args.counts,
        head_counts=args.head_counts,
        seeds=args.seeds,
        protect=args.protect,
        speed=args.speed,
        task_counts=args.task_counts,
        post_norm_policy=args.post_norm_policy,
        **options,
    )
    data = data_request(args)
    settings = ModelSettings(args.model, dtype=args.dtype)
    found = measure_curves(settings, request, args.output, data, test, args.device, args.resume, progress)
    print(curve_markdown(found))
    print(f"wrote {', '.join([RESULTS_FILE, SUMMARY_FILE, TABLE_FILE, *found['figures']])} to {args.output}")
    return 0
