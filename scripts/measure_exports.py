"""Speed of a saved model in several formats beside the same model and its dense shape in PyTorch, all in turns.

    OMP_NUM_THREADS=1 python scripts/measure_exports.py results/minilm-sst2 --formats onnx onnx_int8 openvino_int8
    OMP_NUM_THREADS=1 python scripts/measure_exports.py results/smollm2 --formats onnx gguf_f16 gguf_q8_0 \\
        --batch_sizes 1

Prints a table in Markdown, of a decoder with tokens per second too. The machine must have nothing else to do.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch

from apt_trainer.measure import size_on_disk
from apt_trainer.report.tables import exports_table
from apt_trainer.store.export import export, load_for_export, parse_format
from apt_trainer.store.export.speed import compare_speed
from apt_trainer.store.saved_model import dense_copy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", help="folder of a saved model")
    parser.add_argument("--formats", nargs="+", default=["onnx", "onnx_int8", "openvino", "openvino_int8"])
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--new_tokens", type=int, default=32)
    args = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = load_for_export(args.path)
    dense = dense_copy(model)
    with tempfile.TemporaryDirectory() as place:
        folders = {name: Path(place) / name for name in args.formats}
        records = {}
        for name, folder in folders.items():
            form, quantize = parse_format(name)
            records[name] = export(model, form, folder, quantize=quantize, tokenizer=tokenizer)
            print(f"{name}: largest difference {records[name]['largest_difference']:.1e}", flush=True)
        timed = compare_speed(dense, model, folders, args.batch_sizes, args.length, args.new_tokens)
    for name, speed in timed.items():
        records[name]["speed"] = speed
    sizes = {"disk_bytes": size_on_disk(args.path)}
    sizes["disk_bytes_dense"] = sum(weight.numel() * weight.element_size() for weight in dense.parameters())
    print(exports_table({"exports": records} | sizes))
    for name, speed in timed.items():
        for size, rates in speed.get("tokens_per_second", {}).items():
            print(f"{name}, batch {size}: " + ", ".join(f"{part} {rate:,.1f}/s" for part, rate in rates.items()))


if __name__ == "__main__":
    main()
