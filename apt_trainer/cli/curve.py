"""``apt-trainer curve``: the harm of dropping more and more units, by kind of unit and by ranking."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace

from apt_trainer.cli.analyze import (
    add_data_arguments,
    add_model_arguments,
    add_output_arguments,
    data_request,
    progress,
)
from apt_trainer.cli.benchmark import positive
from apt_trainer.sublayers.choices import COSTS, CURVE_KINDS, DEFAULT_CURVE_KINDS, METHODS

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
    test = parser.add_argument_group("what each drop is measured on")
    test.add_argument("--test", required=True, metavar="TEXT_OR_FILE", help="held-out data, of the forms of --data")
    test.add_argument("--test_samples", type=positive, metavar="N", help="windows or rows (default: as --samples)")
    test.add_argument("--speed", action="store_true", help="speed of each smaller model beside the full one, and SDR")
    test.add_argument("--lm_eval", metavar="A,B", help="tasks of lm-evaluation-harness, or paths of YAML files")
    test.add_argument(
        "--task_counts",
        type=positive,
        nargs="+",
        metavar="N",
        help="where tasks run and speed is timed (default: all counts)",
    )
    test.add_argument("--task_path", metavar="DIR", help="folder with YAML files (default: recipes/lm_eval)")
    test.add_argument("--limit", type=positive, metavar="N", help="use only the first N examples of each task")
    test.add_argument("--num_fewshot", type=int, metavar="N", help="examples before each question")
    add_output_arguments(parser, "folder of curve.json, curve.md, curve.png and results.jsonl")


def run(args: argparse.Namespace, overrides: Sequence[str]) -> int:
    from apt_trainer.depth.curve import RESULTS_FILE, SUMMARY_FILE, TABLE_FILE, CurveRequest, measure_curves
    from apt_trainer.report.curve import curve_markdown
    from apt_trainer.settings import ModelSettings

    request = CurveRequest(
        kinds=args.kinds,
        rankings=args.rankings,
        counts=args.counts,
        head_counts=args.head_counts,
        seeds=args.seeds,
        protect=args.protect,
        speed=args.speed,
        tasks=[name for name in (args.lm_eval or "").split(",") if name],
        task_counts=args.task_counts,
        task_path=args.task_path,
        limit=args.limit,
        num_fewshot=args.num_fewshot,
        batch_size=args.batch_size,
    )
    data = data_request(args)
    test = replace(data, data=args.test, samples=args.test_samples or args.samples)
    settings = ModelSettings(args.model, dtype=args.dtype)
    found = measure_curves(settings, request, args.output, data, test, args.device, args.resume, progress)
    print(curve_markdown(found))
    print(f"wrote {', '.join([RESULTS_FILE, SUMMARY_FILE, TABLE_FILE, *found['figures']])} to {args.output}")
    return 0
