"""Every export format beside every family: one tiny, unevenly cut model each, checked where it will run.

    python scripts/table_formats.py [--families llama bert] [--formats onnx gguf]

Prints a table in Markdown: the largest difference of logits relative to the largest one, whether greedy tokens are
equal, or why a format does not hold a model. Which process loaded each format stands in the header. Some 20 minutes on
two cores, of which the decoders in ONNX take most. Not for speed.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from texts import byte_tokenizer
from tiny import FAMILY_NAMES, LANGUAGE_MODELS, parts, random_plan, tiny_model
from transformers import PreTrainedModel

from apt_trainer import UserError
from apt_trainer.errors import RunError
from apt_trainer.report.tables import markdown_table
from apt_trainer.store.export import export
from apt_trainer.store.saved_model import as_pruned
from apt_trainer.surgery.cutting import apply_plan

FORMATS = ("hf", "per_layer_config", "decilm", "onnx", "openvino", "gguf")
TASKS = dict.fromkeys(FAMILY_NAMES, "ForSequenceClassification") | LANGUAGE_MODELS
TOKENIZER = byte_tokenizer()
SIZES = {"vocab_size": len(TOKENIZER), "max_position_embeddings": 64, "bos_token_id": None, "eos_token_id": 0}
FOR_GGUF = {"hidden_size": 32, "head_dim": 16, "use_sliding_window": False, "attention_bias": False}
LLAMA_LIKE = ("llama", "qwen2", "qwen3", "mistral")
GONE = ("layers.1.heads", "layers.2.neurons", "encoder.1.heads", "decoder.0.neurons")


def cut(family: str) -> PreTrainedModel:
    """A model that lost heads, neurons, an attention and a feed-forward."""
    extra = dict(SIZES)
    if family in LLAMA_LIKE:
        extra |= FOR_GGUF | {"tie_word_embeddings": True}
    if family == "mistral":
        extra["sliding_window"] = None
    if TASKS[family] == "ForConditionalGeneration":
        extra |= {"decoder_start_token_id": 1}
    model = tiny_model(family, TASKS[family], **extra)
    table, spaces, dense = parts(model)
    plan = random_plan(spaces, dense, 5, kinds=("heads", "neurons"), vanish=GONE)
    apply_plan(model, table, spaces, dense, plan)
    as_pruned(model, table, plan)
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", choices=[*TASKS], default=[*TASKS])
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    args = parser.parse_args()
    rows, loaded, why = [], dict.fromkeys(args.formats, ""), {}
    for family in args.families:
        row = {"family": family}
        for form in args.formats:
            with tempfile.TemporaryDirectory() as place:
                try:
                    record = export(cut(family), form, Path(place) / "out", tokenizer=TOKENIZER)
                except (UserError, RunError) as error:
                    why.setdefault(f"{family}, {form}", str(error))
                    row[form] = "–"
                    continue
            loaded[form] = record["loaded_by"]
            row[form] = f"{record['largest_difference'] / record['largest_output']:.0e}"
            if "greedy_tokens_equal" in record:
                row[form] += " =" if record["greedy_tokens_equal"] else " ≠"
        rows.append(row)
        print(row, file=sys.stderr, flush=True)
    columns = [("family", "family", None)]
    columns += [(form, f"{form} ({loaded[form]})" if loaded[form] else form, None) for form in args.formats]
    print(markdown_table(rows, columns))
    print("\n".join(f"- {what}: {sentence}" for what, sentence in why.items()))


if __name__ == "__main__":
    main()
