"""``apt-trainer benchmark``: a saved model against its dense original."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import fields

from apt_trainer.cli.train import settings_help
from apt_trainer.errors import UserError
from apt_trainer.settings import ModelSettings

HELP = "Measure a saved model against a dense one: parameters, FLOPs, latency or generation speed, memory."
TAKES_SETTINGS = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "path", metavar="PATH", help="folder of a saved model, hub name or GGUF file; stands before any setting"
    )
    parser.add_argument(
        "--baseline", metavar="MODEL", help="model to compare with (default: the dense shape of the pruned one)"
    )
    parser.add_argument(
        "--batch_sizes", type=positive, nargs="+", default=[1, 32], metavar="N", help="batch sizes (default: 1 32)"
    )
    parser.add_argument(
        "--length", type=positive, default=128, metavar="N", help="sequence or prompt length in tokens (default: 128)"
    )
    parser.add_argument(
        "--new_tokens", type=positive, default=32, metavar="N", help="tokens to generate, if it can (default: 32)"
    )
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16", "auto"],
        default="float32",
        help="type of the weights (default: float32)",
    )
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda … (default: the accelerator if there is one)")
    parser.add_argument("--output", metavar="FILE.json", help="write all numbers there; '-' prints them")
    parser.epilog = settings_help((ModelSettings,))


def run(args: argparse.Namespace, overrides: Sequence[str]) -> int:
    from apt_trainer.evaluate.compare import benchmark
    from apt_trainer.report.tables import comparison_table
    from apt_trainer.settings.recipe import read_values

    given = read_values(None, overrides)
    other = [name for name in given if name not in {field.name for field in fields(ModelSettings)}]
    if other:
        raise UserError(f"{other[0]} says nothing about the model, which is all that benchmark can be told.")
    metrics = benchmark(
        ModelSettings(**given | {"model_name_or_path": args.path, "dtype": args.dtype}),
        baseline=args.baseline,
        batch_sizes=args.batch_sizes,
        length=args.length,
        new_tokens=args.new_tokens,
        device=args.device,
    )
    measured_on = f"measured on {metrics['device']} in {metrics['dtype']}, {metrics['threads']} threads"
    write_result(args.output, metrics, f"{comparison_table(metrics, with_flops=True)}\n\n{measured_on}")
    return 0


def write_result(output: str | None, numbers: dict[str, object], table: str) -> None:
    """Print the table and write the numbers to a file; with "-" print the numbers instead."""
    if output == "-":
        import json

        print(json.dumps(numbers, indent=2))
        return
    print(table)
    if output is not None:
        from pathlib import Path

        from apt_trainer.store.events import write_json

        Path(output).parent.mkdir(parents=True, exist_ok=True)
        write_json(Path(output), numbers)
        print(f"wrote {output}")


def positive(word: str) -> int:
    number = int(word)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{word} is not positive")
    return number
