"""What the dry run says about memory and scoring, and what stops it as it would stop the run."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from texts import TOKENS, word_tokenizer, words
from tiny import ALL_TASKS, tiny_config
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.training_args import OptimizerNames

from apt_trainer import APTConfig, UserError
from apt_trainer.pruning.pruner import AdaptivePruner
from apt_trainer.report.tables import format_bytes
from apt_trainer.runs import dry_run
from apt_trainer.runs.dry_run import memory_estimate
from apt_trainer.runs.preflight import check_attention
from apt_trainer.runs.run import train
from apt_trainer.settings import DataSettings, ModelSettings
from apt_trainer.settings.recipe import Recipe
from apt_trainer.store.pretrained import load_inputs, load_model
from integration.factories import DEFAULTS, config, cut_copy
from integration.test_nri_before import NRI


@pytest.fixture
def ready(tmp_path: Path) -> Recipe:
    """A language model that would be trained on blocks of 8 tokens, in batches of 8."""
    settings = tiny_config("llama")
    settings.vocab_size = len(TOKENS)
    ALL_TASKS["ForCausalLM"].from_config(settings).save_pretrained(tmp_path / "model")
    word_tokenizer().save_pretrained(tmp_path / "model")
    text = str(tmp_path / "text.txt")
    Path(text).write_text("\n".join(words(7, i) for i in range(100)))
    training = APTConfig(output_dir=str(tmp_path / "out"), **{**DEFAULTS, **NRI, "measure_latency": False})
    training.reference_length = 8
    data = DataSettings(task="language_modeling", train_file=text, validation_file=text, max_length=8)
    return Recipe(ModelSettings(str(tmp_path / "model")), data, training, path=None, given={})


def refused(recipe: Recipe, message: str) -> None:
    """By the dry run and by the run itself, before anything is written."""
    for start in (dry_run.plan, train):
        with pytest.raises(UserError, match=message):
            start(recipe)
    assert not Path(str(recipe.training.output_dir)).exists()


# ---------------------------------------------------------------------------- attention


def test_an_attention_that_nobody_knows_is_refused(ready: Recipe) -> None:
    wrong = replace(ready.model, attn_implementation="sddpa")
    refused(
        replace(ready, model=wrong),
        "attn_implementation='sddpa' is not known. Choose one of: eager.*Did you mean 'sdpa'",
    )


@pytest.mark.parametrize("name", ["sdpaa", "", "flash", "org/", "paged|flush"])
def test_names_that_are_none(name: str) -> None:
    with pytest.raises(UserError, match="Choose one of: eager, .*sdpa.*OWNER/KERNEL of the hub"):
        check_attention(name)


@pytest.mark.parametrize("name", [None, "eager", "sdpa", "flex_attention", "flash_attention_2", "paged|sdpa"])
def test_names_that_transformers_knows(name: str | None) -> None:
    check_attention(name)
    check_attention("kernels-community/flash-attn@main:function")


# ---------------------------------------------------------------------------- optimizers, devices, batches


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("optim", OptimizerNames.LOMO, "optim: lomo cannot be used"),
        ("adam_beta2", 2.0, "optim: adamw_torch_fused cannot be made: Invalid beta parameter at index 1: 2.0"),
        ("_n_gpu", 4, "sees 4 GPUs .*--accelerate_config ddp"),
        ("per_device_train_batch_size", 10_000, "make no whole batch of 10000, and dataloader_drop_last"),
    ],
)
def test_what_stops_the_trainer_stops_the_dry_run(ready: Recipe, name: str, value: Any, message: str) -> None:
    ready.training.dataloader_drop_last = True
    setattr(ready.training, name, value)
    refused(ready, message)


# ---------------------------------------------------------------------------- memory


def on_meta(family: str, task: str, words: int, **sizes: Any) -> PreTrainedModel:
    settings = tiny_config(family, tie_word_embeddings=True, **sizes)
    settings.vocab_size = words
    with torch.device("meta"):
        model: PreTrainedModel = ALL_TASKS[task].from_config(settings)
    return model.requires_grad_(False)


@pytest.mark.parametrize(("family", "task"), [("llama", "ForCausalLM"), ("t5", "ForConditionalGeneration")])
@pytest.mark.parametrize(("bf16", "bytes_per_logit"), [(False, 16), (True, 14)])
def test_every_logit_counts(family: str, task: str, bf16: bool, bytes_per_logit: int, tmp_path: Path) -> None:
    """The logit itself, and in float32 its log-probability and two gradients, for 8 rows of 5 predicted tokens."""
    args, found = config(tmp_path, bf16=bf16), []
    for number in (1000, 3000):
        model = on_meta(family, task, number)
        weights = sum(p.numel() * p.element_size() for p in model.parameters())
        found.append(memory_estimate(model, args, 20, 5) - weights)
    assert found[1] - found[0] == 2000 * 8 * 5 * bytes_per_logit


def test_classes_are_no_words(tmp_path: Path) -> None:
    args = config(tmp_path)
    model = on_meta("bert", "ForSequenceClassification", 1000)
    assert memory_estimate(model, args, 20, 5) == memory_estimate(model, args, 20, 500)


def test_what_is_counted_is_said(ready: Recipe) -> None:
    text = dry_run.plan(ready)
    words = f"logits over {len(TOKENS)} words with log-probabilities and gradients)"
    assert f"(weights, gradients, optimizer, activations, {words} of the dense model" in text
    ready.training.distillation, ready.training.teacher_name_or_path = "model", ready.model.model_name_or_path
    assert "gradients; without the teacher)" in dry_run.plan(ready)


@pytest.mark.parametrize(("dtype", "expected"), [("auto", torch.float32), ("bfloat16", torch.bfloat16)])
def test_weights_count_in_the_type_they_are_loaded_in(
    ready: Recipe, dtype: str, expected: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    ready.model.dtype, seen = dtype, []
    monkeypatch.setattr(dry_run, "memory_estimate", lambda model, *rest: seen.append(model.dtype) or 0)
    dry_run.plan(ready)
    assert seen == [expected] == [load_model(ready.model, load_inputs(ready.model, ready)[2]).dtype]


# ---------------------------------------------------------------------------- scoring


@pytest.mark.parametrize("cost", ["params", "latency"])
def test_the_passes_that_nri_takes_are_said(ready: Recipe, cost: str) -> None:
    ready.training.nri_cost = cost
    assert "scored on 24 training rows in 7 passes (whole, and without each sublayer) and cut" in dry_run.plan(ready)


def test_passes_at_each_event_are_said(ready: Recipe) -> None:
    changes = {"pruning_time": "early", "pruning_end": 30, "num_pruning_events": 2, "max_steps": 40}
    for name, value in changes.items():
        setattr(ready.training, name, value)
    words = (
        "at each event the model is scored on 24 training rows in 7 passes (whole, and without each sublayer) and cut"
    )
    assert words in dry_run.plan(ready)


@pytest.mark.parametrize("cost", ["latency", "memory"])
def test_a_length_that_costs_cannot_be_taken_at_is_refused(ready: Recipe, cost: str) -> None:
    ready.training.reference_length = 50
    assert dry_run.plan(ready)
    ready.training.nri_cost = cost
    refused(ready, "reference_length=50 is more than the 20 positions of the model. Lower reference_length")


# ---------------------------------------------------------------------------- shares of the whole


def test_what_the_rest_weighs_and_what_a_target_means_for_the_blocks(ready: Recipe) -> None:
    wide = tiny_config("llama")
    wide.vocab_size = 400
    model = ALL_TASKS["ForCausalLM"].from_config(wide)
    model.save_pretrained(str(ready.model.model_name_or_path))
    of_blocks = sum(p.numel() for p in model.model.layers.parameters())
    whole, rows = model.num_parameters(), model.lm_head.weight.numel()
    ready.training.importance, ready.training.prune_targets = "salience", ["heads", "neurons"]
    ready.training.min_neurons = 4
    for metric, target in (("params", 0.5), ("total_params", 0.5 * of_blocks / whole)):
        ready.training.sparsity_metric, ready.training.target_sparsity = metric, target
        told = dry_run.plan(ready)
        assert (
            f"blocks {of_blocks / 1000:.1f} k parameters ({of_blocks / whole:.1%}, {4 * of_blocks / 1000:.1f} kB)"
            in told
        )
        assert told.count(f"{rows / 1000:.1f} k parameters ({rows / whole:.1%}, ") == 2  # embeddings and head
        said = r"target +([\d.]+)% of the parameters in blocks \(about ([\d.]+)% of all parameters"
        if metric == "total_params":
            said = r"about ([\d.]+)% of the parameters in blocks, ([\d.]+)% of all parameters"
        found = re.search(said, told)
        assert found is not None
        blocks, all_of_them = (float(share) / 100 for share in found.groups())
        assert 0.5 <= blocks < 0.65  # whole heads
        assert all_of_them == pytest.approx(blocks * of_blocks / whole, abs=3e-3)  # the target, and whole heads
    ready.training.target_sparsity = 0.9
    refused(ready, f"the largest that does not is 0.*Blocks are {of_blocks / whole:.1%} of all parameters")


# ---------------------------------------------------------------------------- a quantised base


@pytest.mark.parametrize(("form", "share"), [("nf4", 0.129), ("int8", 0.25)])
def test_what_a_quantised_base_frees_is_said(ready: Recipe, form: str, share: float) -> None:
    ready.training.base_quantization, ready.training.importance = form, "salience"
    ready.training.prune_targets = ["heads", "neurons"]
    found = re.search(
        rf"frees about [\d.]+ k?B of weights, {form} then about ([\d.]+) kB more \(linear layers of the blocks: "
        r"([\d.]+) kB for ([\d.]+) kB\)",
        dry_run.plan(ready),
    )
    assert found is not None
    freed, after, before = map(float, found.groups())
    model = AutoModelForCausalLM.from_pretrained(str(ready.model.model_name_or_path))
    most = sum(4 * m.weight.numel() for m in model.model.layers.modules() if isinstance(m, torch.nn.Linear)) / 1000
    assert 0.5 * most < before < most
    assert after == pytest.approx(share * before, rel=0.05) and freed == pytest.approx(before - after, abs=0.2)


# ---------------------------------------------------------------------------- several processes


def test_what_each_of_several_processes_holds_is_said(ready: Recipe) -> None:
    ready.training.importance, ready.training.prune_targets = "salience", ["neurons", "heads"]
    path = str(ready.model.model_name_or_path)
    model, finished = (AutoModelForCausalLM.from_pretrained(path) for _ in range(2))
    pruner = AdaptivePruner(model, ready.training)

    def size(module: Any) -> int:
        return sum(p.numel() * p.element_size() for p in module.parameters())

    blocks, whole = [size(layer) for layer in model.model.layers], size(model)
    layer = max(*blocks, whole - sum(blocks))
    cut_copy(finished, dry_run.evenly_cut(pruner, 0.3))
    assert "processes  " not in dry_run.plan(ready)
    told = " ".join(dry_run.plan(ready, processes=4).split())
    assert f"processes 4, weights alone. DDP, ZeRO-1, ZeRO-2: {format_bytes(whole)} each while they load, " in told
    assert f"{format_bytes(4 * whole)} in all ZeRO-3, FSDP2: {format_bytes(whole / 4 + layer)} each (its share" in told
    assert "converted" not in told
    assert f"train, {format_bytes(whole)} on its device while the model is scored before the cut; " in told
    assert f"the finished model, {format_bytes(size(finished))}, in each at the end" in told
    halved = replace(ready, model=replace(ready.model, dtype="bfloat16"))
    assert "while they are converted as they load" in dry_run.plan(halved, processes=4)
    with pytest.raises(UserError, match="--processes 0 must be at least 1"):
        dry_run.plan(ready, processes=0)
