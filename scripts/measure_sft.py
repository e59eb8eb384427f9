"""TRL's SFT with the method beside the recipe: SmolLM2 on GSM8K through ``APTSFTTrainer``.

    python scripts/measure_sft.py [--steps 200] [--output_dir out/smollm2_sft]

The settings are those of ``recipes/smollm2/gsm8k.yaml``; data are prompts with completions as TRL takes them, with its
loss on completions. What comes out is evaluated as the recipe's own result is. Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import fields
from pathlib import Path

from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from apt_trainer import APTSFTTrainer
from apt_trainer.runs.run import evaluate
from apt_trainer.settings import resolve_path
from apt_trainer.settings.recipe import load_recipe

RECIPE = Path(__file__).parents[1] / "recipes/smollm2/gsm8k.yaml"
NOT_TAKEN = {"model_name_or_path", "gguf_file", "dtype", "lm_eval_tasks", "max_steps", "output_dir"}
"""Keys of the recipe that are not for ``APTSFTTrainer.Config``, which has the others where it has their name."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--output_dir", default="out/smollm2_sft")
    args = parser.parse_args()
    recipe = load_recipe(str(RECIPE), ["--output_dir", args.output_dir])
    folder = resolve_path(str(recipe.model.model_name_or_path))
    source = {"gguf_file": recipe.model.gguf_file}
    whole = GgufConfig(dequantize=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, **source)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=recipe.model.dtype, quantization_config=whole, **source)

    rows = load_dataset("json", data_files=str(recipe.data.train_file), split="train")
    rows = rows.train_test_split(recipe.data.validation_fraction, seed=recipe.training.seed)["train"]
    before, _, after = str(recipe.data.template).partition("{answer}")
    assert not after, "the completion ends the template"
    rows = rows.map(
        lambda row: {"prompt": before.format(question=row["question"]), "completion": row["answer"]},
        remove_columns=rows.column_names,
    )
    names = {field.name for field in fields(APTSFTTrainer.Config)} - NOT_TAKEN
    settings = APTSFTTrainer.Config(
        output_dir=args.output_dir,
        max_steps=args.steps,
        save_strategy="no",
        gradient_checkpointing=False,  # TRL's default; the recipe trains without
        bf16=False,  # the weights are bfloat16
        **{key: value for key, value in recipe.given.items() if key in names},
    )
    trainer = APTSFTTrainer(model, settings, train_dataset=rows, processing_class=tokenizer)
    seconds = time.process_time()
    trainer.train()
    seconds = time.process_time() - seconds
    trainer.save_model(args.output_dir)
    removed = trainer.pruner.sparsity()
    del trainer, model
    scores = evaluate(args.output_dir, recipe)
    json.dump({"steps": args.steps, "sparsity": removed, "train_cpu_seconds": seconds} | scores, sys.stdout, indent=2)


if __name__ == "__main__":
    main()
