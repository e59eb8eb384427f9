"""A tiny language model, a tokenizer of whole words, texts of such words, and tasks of lm_eval on local rows."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from tiny import randomise
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from apt_trainer.settings.shipped import TASKS

WORDS = [f"w{i}" for i in range(56)]
TOKENS = ["<pad>", "<s>", "</s>", "<unk>", *WORDS]
POSITIONS = 32


def llama_config(**changes: object) -> LlamaConfig:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    values = {"vocab_size": len(TOKENS), "num_key_value_heads": 2, "max_position_embeddings": POSITIONS}
    return LlamaConfig(**{**values, **sizes, **special, **changes})


def tiny_llama(**changes: object) -> LlamaForCausalLM:
    model = LlamaForCausalLM(llama_config(**changes))
    randomise(model, seed=4)
    return model.eval()


def word_tokenizer() -> PreTrainedTokenizerFast:
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(TOKENS)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=core, **special)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE as GPT-2 has it, with merges learnt from a few words."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<end>", "<pad>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    raw.train_from_iterator(["the cat sat on the mat"] * 9 + ["return the matter"] * 9, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<end>", pad_token="<pad>")


def words(count: int, seed: int = 0) -> str:
    return " ".join(np.random.default_rng(seed).choice(WORDS, size=count))


def local_task(folder: Path, name: str, rows: list[dict[str, object]]) -> str:
    """A YAML that points a shipped task to other data, as its comment says; returns its path."""
    data, file = folder / f"{name}.jsonl", folder / f"my_{name}.yaml"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = [f"include: {TASKS / name}_local.yaml", f"task: my_{name}"]
    file.write_text("\n".join([*lines, f"dataset_kwargs: {{data_files: {{validation: {data}}}}}"]))
    return str(file)


def save_dense(folder: Path, text: str, **changes: object) -> Path:
    """``folder`` with a tiny model and its tokenizer in ``model``, and ``text`` in ``text.txt``."""
    tiny_llama(**changes).save_pretrained(folder / "model")
    word_tokenizer().save_pretrained(folder / "model")
    (folder / "text.txt").write_text(text)
    return folder


def model_and_data(saved: Path) -> list[str]:
    """Arguments of a command on what :func:`save_dense` wrote."""
    return ["--model", str(saved / "model"), "--data", str(saved / "text.txt"), "--length", "8", "--device", "cpu"]
