"""Two real processes: ``scripts/train.py`` under the launchers of others (torchrun, accelerate and deepspeed), and
``apt-trainer train`` with the profiles that no other test starts. Whatever a launcher starts does not start warm."""

from __future__ import annotations

import json
import math
import os
import socket
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import warm
from texts import TOKENS, save_dense, word_tokenizer, words
from tiny import randomise
from tokenizers import processors
from transformers import T5Config, T5ForConditionalGeneration

import apt_trainer
from apt_trainer import load_pruned
from apt_trainer.measure import count_parameters
from apt_trainer.models import family_of
from integration.factories import events_of
from integration.test_zero import deepspeed_config

ROOT = Path(apt_trainer.__file__).parents[1]
PROFILE = str(ROOT / "recipes" / "accelerate" / "zero2_cpu.yaml")
PAD, EOS = 0, 2
RECIPE: dict[str, Any] = {
    "max_steps": 12,
    "pruning_start": 2,
    "pruning_end": 8,
    "num_pruning_events": 2,
    "mask_window": 2,
    "distillation_end": 10,
    "target_sparsity": 0.4,
    "prune_targets": ["heads", "neurons", "hidden", "sublayers"],
    "round_to": 1,
    "min_hidden": 8,
    "lora_r": 2,
    "learning_rate": 1e-3,
    "heldout_fraction": 0.1,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 4,
    "eval_strategy": "steps",
    "eval_steps": 4,
    "save_strategy": "steps",
    "save_steps": 12,
    "logging_steps": 1,
    "max_length": 16,
    "use_cpu": True,
    "measure_latency": False,
    "report_to": "none",
    "disable_tqdm": True,
    "seed": 3,
}
"""Events after 5 and 8: evaluations at 4, 8 and 12 are of the masked, the just cut and the final model."""


def save_t5(folder: Path) -> None:
    config = T5Config(
        vocab_size=len(TOKENS),
        d_model=16,
        d_kv=6,
        d_ff=20,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=PAD,
        pad_token_id=PAD,
        eos_token_id=EOS,
    )
    model = T5ForConditionalGeneration(config)
    randomise(model, seed=6)
    model.save_pretrained(folder)
    tokenizer = word_tokenizer()
    template = processors.TemplateProcessing("$A </s>", "$A </s> $B </s>", [("</s>", EOS)])
    tokenizer._tokenizer.post_processor = template
    tokenizer.save_pretrained(folder)


def recipe(folder: Path, rows: list[dict[str, str]], **changes: Any) -> Path:
    """A recipe on ``rows`` for the model in ``folder``/model, with a part of them as validation data."""
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = {**RECIPE, "model_name_or_path": str(folder / "model"), "output_dir": str(folder / "out")}
    file = folder / "recipe.json"
    file.write_text(json.dumps({**given, "train_file": str(data), "validation_fraction": 0.1, **changes}))
    return file


def launched(launcher: Sequence[str], file: Path, *words: str) -> Path:
    """Run ``scripts/train.py`` with the recipe in ``file`` under ``launcher``; returns its output folder."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    variables = {"ACCELERATE_USE_CPU": "true", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    variables |= {"HF_DATASETS_CACHE": str(file.parent / "cache"), "PYTHONPATH": str(ROOT)}
    command = [part.replace("PORT", port) for part in launcher]
    result = subprocess.run(
        [warm.python(), *command, str(ROOT / "scripts" / "train.py"), "--config", str(file), *words],
        env={**os.environ, **variables},
        cwd=file.parent,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return file.parent / "out"


def check_saved(output: Path) -> dict[str, Any]:
    """The saved model is what the run of two processes said it is, within the budget; returns its metrics."""
    metrics, last = json.loads((output / "metrics.json").read_text()), events_of(output, "prune")[-1]
    assert metrics["train_steps"] == 12 and metrics["block_params"] == last["block_params"]
    assert metrics["block_params"] <= 0.6 * metrics["block_params_dense"]
    model = load_pruned(output)
    assert count_parameters(model) == metrics["total_params"] < metrics["total_params_dense"]
    blocks = tuple(path + "." for path in family_of(model.config).block_modules(model))
    counted = sum(p.numel() for name, p in model.named_parameters() if name.startswith(blocks))
    assert counted == metrics["block_params"]
    state = json.loads((output / "checkpoint-12" / "apt_state.json").read_text())
    assert state["processes"] == 2
    return metrics


def logged(output: Path, name: str) -> dict[int, float]:
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return {entry["step"]: entry[name] for entry in history if name in entry}


@pytest.mark.distributed
def test_torchrun_prunes_a_summarizer_and_generates_in_between(tmp_path: Path) -> None:
    save_t5(tmp_path / "model")
    rows = [{"article": words(12, seed), "summary": words(4, seed)} for seed in range(90)]
    names = {"task": "summarization", "text_column": "article", "target_column": "summary", "max_target_length": 7}
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "PORT"]
    output = launched(launcher, recipe(tmp_path, rows, **names))
    metrics = check_saved(output)
    assert metrics["engine"] == "ddp"
    rouge = logged(output, "eval_rougeL")
    assert list(rouge) == [4, 8, 12] and all(0 <= value <= 1 for value in rouge.values())
    assert metrics["task_metric"] == metrics["scores"]["validation_rougeL"] == pytest.approx(rouge[12], abs=1e-9)
    tokens = load_pruned(output).eval().generate(torch.tensor([[5, 6, 7, EOS]]), max_new_tokens=5)
    assert tokens[0, 0] == PAD and tokens.shape[1] <= 6


CONFIG = deepspeed_config(2)
LAUNCHERS: dict[str, tuple[list[str], dict[str, Any] | None]] = {
    "accelerate": (["-m", "accelerate.commands.launch", "--config_file", PROFILE], None),
    "deepspeed": (["-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", "PORT"], CONFIG),
}
"""How the processes start, and the DeepSpeed configuration that the recipe names by its path."""


@pytest.mark.distributed
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_zero_2_in_bfloat16_with_gradient_checkpointing(launcher: str, tmp_path: Path) -> None:
    command, config = LAUNCHERS[launcher]
    save_dense(tmp_path, "")
    rows = [{"prompt": words(5, seed), "completion": words(4, seed)} for seed in range(90)]
    changes: dict[str, Any] = {"task": "instruction_tuning", "bf16": True, "gradient_checkpointing": True}
    if config is not None:
        (tmp_path / "zero2.json").write_text(json.dumps(config))
        changes["deepspeed"] = str(tmp_path / "zero2.json")
    output = launched(command, recipe(tmp_path, rows, **changes))
    assert check_saved(output)["engine"] == "zero2"
    perplexity = logged(output, "eval_perplexity")
    assert list(perplexity) == [4, 8, 12] and all(1 < value < math.inf for value in perplexity.values())
    model = load_pruned(output).eval()
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())
    assert model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, min_new_tokens=4).shape == (1, 7)


PROFILES = {"zero3_offload_cpu": "zero3", "fsdp2_cpu": "fsdp2"}


def trained(folder: Path, *words: str) -> tuple[dict[str, Any], dict[int, float]]:
    """(metrics, loss by step) of ``apt-trainer train`` in an environment that says nothing about CPUs."""
    unset = ("ACCELERATE_USE_CPU", "DS_ACCELERATOR")
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    environment |= {"OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": str(folder / "cache"), "PYTHONPATH": str(ROOT)}
    command = [warm.python(), "-m", "apt_trainer", "train", "--config", str(folder / "recipe.json"), *words]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, result.stderr[-4000:]
    output = Path(words[words.index("--output_dir") + 1])
    return json.loads((output / "metrics.json").read_text()), logged(output, "loss")


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, float]]:
    """(folder of a recipe and its run "alone", of one process; the losses of that run)."""
    folder = save_dense(tmp_path_factory.mktemp("profiles"), "")
    rows = [{"prompt": words(5, seed), "completion": words(4, seed)} for seed in range(90)]
    recipe(folder, rows, task="instruction_tuning", use_cpu=False)
    metrics, losses = trained(
        folder, "--use_cpu", "true", "--per_device_train_batch_size", "8", "--output_dir", str(folder / "alone")
    )
    assert metrics["engine"] == "one process" and len(losses) == 12
    return folder, losses


@pytest.mark.distributed
@pytest.mark.parametrize("profile", PROFILES)
def test_a_profile_without_accelerators_gives_the_run_of_one_process(
    profile: str, alone: tuple[Path, dict[int, float]]
) -> None:
    folder, losses = alone
    metrics, others = trained(folder, "--accelerate_config", profile, "--output_dir", str(folder / profile))
    assert check_saved(folder / profile) == metrics
    assert metrics["engine"] == PROFILES[profile]
    plans = [json.loads((folder / name / "pruning_plan.json").read_text()) for name in ("alone", profile)]
    assert plans[0] == plans[1]
    assert others == pytest.approx(losses, rel=1e-5)
