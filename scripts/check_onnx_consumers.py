"""Loads exported ONNX folders by programs that are not in the test suite: what they compute is compared.

    python scripts/check_onnx_consumers.py --venv out/venv-onnx [--only genai fastembed sentence_transformers optimum]

Makes the environment at ``--venv`` if it is not there. FastEmbed and sentence-transformers (``backend="onnx"``,
through optimum, which wants a transformers below 4.58) embed a text with an uneven encoder; onnxruntime-genai
generates with an uneven decoder, optimum with an uneven encoder and decoder. Exits with 1 where something differs.
transformers.js is in the suite (marker ``node``).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

import torch
from transformers import AutoModel, PreTrainedModel

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from texts import byte_tokenizer
from tiny import parts, random_plan, tiny_config, tiny_model

from apt_trainer.store.export import export
from apt_trainer.store.export.check import greedy
from apt_trainer.store.saved_model import as_pruned
from apt_trainer.surgery.cutting import apply_plan

PACKAGES = ("fastembed", "onnxruntime-genai", "sentence-transformers", "optimum-onnx[onnxruntime]")
TEXT = "the cat sat on the matter"
PROMPT, NEW_TOKENS = [5, 9, 44, 120, 7, 31], 12
RUN = {
    "genai": """
import json, sys, numpy as np, onnxruntime_genai as og
folder, prompt, new = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
model = og.Model(folder); given = og.GeneratorParams(model)
given.set_search_options(max_length=len(prompt) + new, min_length=len(prompt) + new, do_sample=False)
run = og.Generator(model, given); run.append_tokens(np.array([prompt], np.int32))
while not run.is_done(): run.generate_next_token()
print("FOUND", json.dumps([int(token) for token in run.get_sequence(0)][len(prompt):]))
""",
    "fastembed": """
import json, sys
from fastembed import TextEmbedding
from fastembed.common.model_description import ModelSource, PoolingType
TextEmbedding.add_custom_model(model="own/small", pooling=PoolingType.MEAN, normalization=False,
    sources=ModelSource(hf="own/small"), dim=int(sys.argv[3]), model_file="onnx/model.onnx")
model = TextEmbedding("own/small", specific_model_path=sys.argv[1])
print("FOUND", json.dumps([float(x) for x in next(iter(model.embed([sys.argv[2]])))]))
""",
    "sentence_transformers": """
import json, sys
from sentence_transformers import SentenceTransformer
model = SentenceTransformer(sys.argv[1], backend="onnx", model_kwargs={"file_name": "model.onnx"})
print("FOUND", json.dumps([float(x) for x in model.encode([sys.argv[2]])[0]]))
""",
    "optimum": """
import json, sys, torch
from optimum.onnxruntime import ORTModelForSeq2SeqLM
model = ORTModelForSeq2SeqLM.from_pretrained(sys.argv[1], subfolder="onnx")
prompt, new = torch.tensor([json.loads(sys.argv[2])]), int(sys.argv[3])
given = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "eos_token_id": None}
found = model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), **given)
print("FOUND", json.dumps(found[0, 1:].tolist()))
""",
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--venv", type=Path, required=True, metavar="DIR", help="environment of the consumers")
    parser.add_argument("--only", nargs="+", choices=[*RUN], default=[*RUN])
    args = parser.parse_args()
    python = args.venv / "bin" / "python"
    if not python.exists():
        venv.create(args.venv, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *PACKAGES], check=True)
    differ = []
    with tempfile.TemporaryDirectory() as place:
        for name in args.only:
            folder = Path(place) / name
            if name in ("genai", "optimum"):
                model = decoder() if name == "genai" else two_stacks()
                expected: list[float] = greedy(model, torch.tensor([PROMPT]), NEW_TOKENS)
                asked = [json.dumps(PROMPT), str(NEW_TOKENS)]
            else:
                model = embedder()
                with torch.no_grad():
                    hidden = model(**byte_tokenizer()(TEXT, return_tensors="pt")).last_hidden_state
                expected = hidden.mean(1)[0].tolist()
                asked = [TEXT, str(len(expected))]
            export(model, "onnx", folder, tokenizer=byte_tokenizer())
            if name == "sentence_transformers":
                describe_pooling(folder, len(expected))
            command = [str(python), "-c", RUN[name], str(folder), *asked]
            done = subprocess.run(command, cwd=place, capture_output=True, text=True)
            told = [line for line in done.stdout.splitlines() if line.startswith("FOUND ")]
            found = json.loads(told[0].removeprefix("FOUND ")) if told else []
            pairs = zip(found, expected, strict=False)
            gap = max((abs(ours - theirs) for ours, theirs in pairs), default=float("inf"))
            equal = len(found) == len(expected) and gap < 1e-4
            print(f"{name}: {'equal' if equal else 'differs'} (largest difference {gap:.1e})")
            if not equal:
                differ.append(name)
                print(done.stderr[-2000:], file=sys.stderr)
    return 1 if differ else 0


def describe_pooling(folder: Path, width: int) -> None:
    """What sentence-transformers saves beside a model whose vectors are means over its tokens."""
    parts = [("0", "", "Transformer"), ("1", "1_Pooling", "Pooling")]
    modules = [
        {"idx": int(i), "name": i, "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, path, kind in parts
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    pooling = {"word_embedding_dimension": width, "pooling_mode_mean_tokens": True}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))


def cut(model: PreTrainedModel, gone: str = "layers.1.heads") -> PreTrainedModel:
    family, spaces, dense = parts(model)
    plan = random_plan(spaces, dense, 5, kinds=("heads", "neurons"), vanish=(gone,))
    apply_plan(model, family, spaces, dense, plan)
    as_pruned(model, family, plan)
    return model.eval()


def embedder() -> PreTrainedModel:
    torch.manual_seed(0)
    return cut(AutoModel.from_config(tiny_config("bert", vocab_size=300, max_position_embeddings=64)))


def two_stacks() -> PreTrainedModel:
    return cut(tiny_model("t5", "ForConditionalGeneration", vocab_size=300), "decoder.0.cross_heads")


def decoder() -> PreTrainedModel:
    return cut(tiny_model("llama", "ForCausalLM", vocab_size=300, max_position_embeddings=64))


if __name__ == "__main__":
    sys.exit(main())
