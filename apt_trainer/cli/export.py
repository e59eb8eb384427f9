"""``apt-trainer export``: a finished model in the format of another runtime, checked where it will run."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

HELP = "Write a finished model as ONNX or GGUF, and check the result in a process without apt_trainer."
TAKES_SETTINGS = False


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="PATH", help="folder of a saved model, hub name or GGUF file")
    parser.add_argument(
        "--format",
        required=True,
        choices=["onnx", "openvino", "gguf", "hf", "adapter"],
        help="onnx: encoders and decoders, for onnxruntime and browsers; openvino: the same, for Intel; gguf: LLaMA, "
        "Mistral, Qwen, for llama.cpp; hf: for transformers, or vLLM with --style; adapter: what is not in the dense "
        "base, of a run with keep_adapters, for load_pruned",
    )
    parser.add_argument(
        "--style",
        choices=["per_layer_config", "decilm"],
        help="with --format hf, for vLLM: per_layer_config, transformers' standard (--model-impl transformers); "
        "decilm, vLLM's own class for LLaMA and Mistral",
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="folder to make")
    parser.add_argument(
        "--speed",
        action="store_true",
        help="also time it beside the model and the dense one in PyTorch, all in turns on the CPU (minutes)",
    )
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1], metavar="N", help="with --speed")
    parser.add_argument("--length", type=int, default=128, help="tokens per sequence or prompt, with --speed")
    parser.add_argument("--new_tokens", type=int, default=32, help="tokens that are decoded, with --speed")
    parser.add_argument(
        "--quantize",
        metavar="KIND",
        help="int8 (onnx, openvino); f16, q8_0, q5_0, q4_0, q4_k_m, q5_k_m or q6_k (gguf)",
    )


def run(args: argparse.Namespace, overrides: Sequence[str]) -> int:
    from apt_trainer.errors import UserError
    from apt_trainer.store.export import export, is_timed

    if args.style is not None and args.format != "hf":
        raise UserError(f"--style {args.style} is for --format hf. Leave one of them out.")
    record = export(args.path, args.style or args.format, args.output, quantize=args.quantize)
    print(told(args.output, record))
    if args.speed and is_timed(record):
        print(f"\n{_timed(args)}")
    return 0


def told(output: str, record: Mapping[str, Any]) -> str:
    """What was written to ``output``, and what the check of it has found."""
    from apt_trainer.report.tables import format_bytes

    written = f"{output}/{record['file']}: {format_bytes(record['bytes'])}"
    if record["loaded_by"] is None:
        return (
            f"{written}\nNothing that runs it is installed here, so it was not checked "
            "(pip install 'apt-trainer[export]')."
        )
    said = [f"largest difference {record['largest_difference']:.2g} of {record['largest_output']:.3g}"]
    if "same_prediction" in record:
        said.append(f"same prediction in {record['same_prediction']:.1%}")
    if "greedy_tokens_equal" in record:
        said.append(f"greedy tokens {'equal' if record['greedy_tokens_equal'] else 'differ'}")
    alone = "" if record["loaded_by"] == "apt_trainer" else " in a process without apt_trainer"
    return f"{written}\nloaded by {record['loaded_by']}{alone}: {', '.join(said)}"


def _timed(args: argparse.Namespace) -> str:
    """Time what was written, tell it in ``export.json`` too, and lay it out."""
    from apt_trainer.report.tables import exports_table
    from apt_trainer.store.events import write_json
    from apt_trainer.store.export import RECORD, load_for_export
    from apt_trainer.store.export.speed import compare_speed
    from apt_trainer.store.saved_model import dense_copy

    model, _ = load_for_export(args.path)
    name, folder = f"{args.format} {args.quantize or ''}".strip(), Path(args.output)
    sizes = args.batch_sizes, args.length, args.new_tokens
    speed = compare_speed(dense_copy(model), model, {name: folder}, *sizes)[name]
    record = json.loads((folder / RECORD).read_text(encoding="utf-8")) | {"speed": speed}
    write_json(folder / RECORD, record)
    lines = [exports_table({"exports": {name: record}})]
    lines += [
        f"{part}, batch {size}: {rate:,.1f} tokens/s"
        for size, rates in speed.get("tokens_per_second", {}).items()
        for part, rate in rates.items()
    ]
    lines.append(f"Multiples of the dense model's speed in PyTorch, on the CPU, {speed['threads']} threads each.")
    return "\n".join(lines)
