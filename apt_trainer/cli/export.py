"""``apt-trainer export``: a finished model in the format of another runtime, checked where it will run."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

HELP = "Write a finished model as ONNX or GGUF, and check the result in a process without apt_trainer."
TAKES_SETTINGS = False


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="PATH", help="folder of a saved model, hub name or GGUF file")
    parser.add_argument(
        "--format",
        required=True,
        choices=["onnx", "gguf"],
        help="onnx: encoders and decoders, for onnxruntime and browsers; gguf: LLaMA, Mistral, Qwen, for llama.cpp",
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="folder to make")
    parser.add_argument(
        "--quantize", metavar="KIND", help="int8 (onnx); f16, q8_0, q5_0, q4_0, q4_k_m, q5_k_m or q6_k (gguf)"
    )


def run(args: argparse.Namespace, overrides: Sequence[str]) -> int:
    from apt_trainer.report.tables import format_bytes
    from apt_trainer.store.export import export

    record = export(args.path, args.format, args.output, quantize=args.quantize)
    print(f"{args.output}/{record['file']}: {format_bytes(record['bytes'])}")
    if record["loaded_by"] is None:
        print("Nothing that runs it is installed here, so it was not checked (pip install 'apt-trainer[export]').")
        return 0
    said = [f"largest difference {record['largest_difference']:.2g} of {record['largest_output']:.3g}"]
    said.append(f"same prediction in {record['same_prediction']:.1%}")
    if "greedy_tokens_equal" in record:
        said.append(f"greedy tokens {'equal' if record['greedy_tokens_equal'] else 'differ'}")
    print(f"loaded by {record['loaded_by']} in a process without apt_trainer: {', '.join(said)}")
    return 0
