"""``apt-trainer analyze``: which attentions, feed-forwards and layers a model can do without."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from typing import Any

from apt_trainer.cli.benchmark import positive
from apt_trainer.settings.choices import POST_NORM_POLICIES
from apt_trainer.studies.choices import COSTS

HELP = "Score every attention, feed-forward and layer of a model on a text: cosine importance, impact, similarity."
TAKES_SETTINGS = False
DTYPES = ("auto", "float32", "bfloat16", "float16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    add_data_arguments(parser, required=True)
    parser.add_argument(
        "--methods", nargs="+", choices=["cosine", "nri"], default=["cosine", "nri"], help="default: both"
    )
    parser.add_argument(
        "--cost", choices=COSTS, default="params", help="what relative impact is divided by (default: params)"
    )
    add_policy_argument(parser)
    add_output_arguments(parser, "folder of scores.json, scores.md and scores.png")


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", required=True, metavar="MODEL", help="folder, hub name or GGUF file of a dense model"
    )
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="type of the weights (default: as saved)")
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda … (default: the accelerator if there is one)")


def add_policy_argument(parser: Any) -> None:
    """``parser``: or a group of one."""
    parser.add_argument(
        "--post_norm_policy",
        choices=POST_NORM_POLICIES,
        default=POST_NORM_POLICIES[0],
        help="BERT, RoBERTa, XLM-RoBERTa, DistilBERT: a sublayer without which the model runs goes with its norm, "
        "y = x (default), or leaves it, y = norm(x)",
    )


def add_data_arguments(parser: argparse.ArgumentParser, required: bool) -> None:
    group = parser.add_argument_group("calibration data")
    group.add_argument(
        "--data",
        required=required,
        metavar="TEXT_OR_FILE",
        help="a text, a text file, or a .jsonl file of rows with text and label",
    )
    group.add_argument("--samples", type=positive, default=64, metavar="N", help="windows or rows (default: 64)")
    group.add_argument(
        "--length", type=positive, metavar="T", help="tokens per window (default: 512, or the most the model takes)"
    )
    group.add_argument("--batch_size", type=positive, default=1, metavar="N", help="windows at a time (default: 1)")
    group.add_argument("--seed", type=int, default=0, metavar="N", help="for what is drawn (default: 0)")


def add_held_out_arguments(parser: argparse.ArgumentParser, required: bool = False) -> None:
    """Held-out data and tasks."""
    test = parser.add_argument_group("held-out data, and tasks of lm-evaluation-harness")
    test.add_argument(
        "--test", required=required, metavar="TEXT_OR_FILE", help="held-out data, of the forms of --data"
    )
    test.add_argument("--test_samples", type=positive, metavar="N", help="windows or rows (default: as --samples)")
    add_task_arguments(test)


def add_task_arguments(group: Any) -> None:
    """``group``: of a parser."""
    group.add_argument("--lm_eval", metavar="A,B", help="names of tasks, or paths of YAML files")
    group.add_argument("--task_path", metavar="DIR", help="folder with YAML files (default: those shipped)")
    group.add_argument("--limit", type=positive, metavar="N", help="use only the first N examples of each task")
    group.add_argument("--num_fewshot", type=int, metavar="N", help="examples before each question")


def add_output_arguments(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument("--output", required=True, metavar="DIR", help=what)
    parser.add_argument("--resume", action="store_true", help="go on with a measurement that was stopped")


def data_request(args: argparse.Namespace) -> Any:
    from apt_trainer.studies.inputs import DataRequest

    return DataRequest(args.data, args.samples, args.length, args.batch_size, args.seed)


def task_options(args: argparse.Namespace) -> dict[str, Any]:
    """The tasks, as requests name them."""
    return {
        "tasks": [name for name in (args.lm_eval or "").split(",") if name],
        "task_path": args.task_path,
        "limit": args.limit,
        "num_fewshot": args.num_fewshot,
        "batch_size": args.batch_size,
    }


def held_out_options(args: argparse.Namespace) -> dict[str, Any]:
    """The held-out data (None: not given) and the tasks."""
    from apt_trainer.studies.inputs import DataRequest

    samples, options = args.test_samples or args.samples, (args.length, args.batch_size, args.seed)
    return {"test": None if args.test is None else DataRequest(args.test, samples, *options)} | task_options(args)


def progress(items: Sequence[Any], name: str) -> Iterable[Any]:
    """A bar on the error stream, whose estimate is from the work still to do."""
    from tqdm import tqdm

    return tqdm(items, desc=name, disable=not items)  # type: ignore[no-any-return]


def run(args: argparse.Namespace, overrides: Sequence[str]) -> int:
    from apt_trainer.report.sublayers import scores_markdown
    from apt_trainer.settings import ModelSettings
    from apt_trainer.studies.analyze import PLOT_FILE, SCORES_FILE, TABLE_FILE, analyze

    found = analyze(
        ModelSettings(args.model, dtype=args.dtype),
        data_request(args),
        args.output,
        methods=args.methods,
        cost=args.cost,
        device=args.device,
        resume=args.resume,
        watch=progress,
        post_norm_policy=args.post_norm_policy,
    )
    print(scores_markdown(found))
    print(f"wrote {SCORES_FILE}, {TABLE_FILE} and {PLOT_FILE} to {args.output}")
    return 0
