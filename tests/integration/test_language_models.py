"""Whole runs of decoders and of a model with two stacks: trained, cut, distilled, resumed, saved."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from texts import POSITIONS, TOKENS, WORDS, save_dense, word_tokenizer
from tiny import LANGUAGE_MODELS, LAYERS, logits, randomise, tiny_batch, tiny_config, tiny_model
from torch.nn import functional as F
from transformers import OPTForCausalLM

from apt_trainer import APTTrainer, load_pruned
from apt_trainer.distillation.losses import layer_outputs
from apt_trainer.errors import UserError
from apt_trainer.models import HIDDEN
from apt_trainer.report.plots import plot_run
from apt_trainer.runs.run import evaluate, train
from apt_trainer.settings.recipe import Recipe, load_recipe
from integration.factories import (
    SHORT,
    Fixed,
    Rows,
    SaveAt,
    counted_block_parameters,
    events_of,
    losses_of,
    make_trainer,
    target_of,
    weights_of,
)
from integration.test_launchers import recipe

NAMES = ("llama", "gpt2", "t5")
OTHERS = tuple(name for name in LANGUAGE_MODELS if name not in NAMES)


def _trainer(folder: Path, name: str, save: tuple[int, ...] = (), **changes: Any) -> APTTrainer:
    model = tiny_model(name, LANGUAGE_MODELS[name], dropout=0.1)
    options = {"callbacks": [SaveAt(save)], **changes.pop("options", {})}
    data = Rows(60, "target" if name in ("t5", "mt5") else "text")
    return make_trainer(folder, model, data, options, **{**SHORT, "round_to": 1, **changes})


@pytest.fixture(scope="module", params=NAMES)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, APTTrainer]:
    folder = tmp_path_factory.mktemp(request.param)
    trainer = _trainer(folder, request.param, (4, 6))
    trainer.train()
    trainer.model.eval()
    return request.param, folder, trainer


def test_a_run_meets_its_target_and_tells_the_real_sizes(run: tuple[str, Path, APTTrainer]) -> None:
    name, folder, trainer = run
    last = events_of(folder, "prune")[-1]
    assert 0.5 <= last["sparsity"] < 0.53 and last["sparsity"] == trainer.pruner.sparsity()
    assert counted_block_parameters(trainer) == last["block_params"]
    labels = {"encoder.0", "encoder.1", "encoder.2", "decoder.0", "decoder.1"} if name == "t5" else {"0", "1", "2"}
    assert set(last["neurons"]) == labels
    assert set(last["heads"]) == labels | ({"decoder.0.cross", "decoder.1.cross"} if name == "t5" else set())
    plot_run(events_of(folder), trainer.state.log_history, folder / "run.png", name)
    assert (folder / "run.png").stat().st_size > 10_000


def test_a_run_learns_from_its_teacher(run: tuple[str, Path, APTTrainer]) -> None:
    _, folder, trainer = run
    assert [record["step"] for record in events_of(folder, "teacher")][0] == 2
    distances = {step: losses[2] for step, losses in losses_of(trainer).items() if len(losses) == 3}
    assert min(distances) > 2 and all(value > 0 for value in distances.values())


def _assert_resumes(name: str, folder: Path, whole: APTTrainer, step: int, to: Path) -> None:
    resumed = _trainer(to, name)
    resumed.train(resume_from_checkpoint=str(folder / f"checkpoint-{step}"))
    expected, got = weights_of(whole.model), weights_of(resumed.model)
    assert expected.keys() == got.keys()
    assert [key for key in expected if not torch.equal(expected[key], got[key])] == []
    assert resumed.pruner.plan == whole.pruner.plan and losses_of(resumed) == losses_of(whole)


@pytest.mark.parametrize("step", [4, 6])
def test_straight_and_resumed_are_bit_equal(run: tuple[str, Path, APTTrainer], step: int, tmp_path: Path) -> None:
    name, folder, whole = run
    _assert_resumes(name, folder, whole, step, tmp_path)


@pytest.mark.parametrize("name", OTHERS)
def test_a_run_of_every_other_family_resumes_bit_equal(name: str, tmp_path: Path) -> None:
    """From within the first mask window, and between the events."""
    whole = _trainer(tmp_path, name, (4, 6))
    whole.train()
    assert 0.5 <= whole.pruner.sparsity() < 0.54 and len(losses_of(whole)) == SHORT["max_steps"]
    assert counted_block_parameters(whole) == events_of(tmp_path, "prune")[-1]["block_params"]
    for step in (4, 6):
        _assert_resumes(name, tmp_path, whole, step, tmp_path / str(step))


def test_the_result_loads_with_equal_logits_and_generates(run: tuple[str, Path, APTTrainer], tmp_path: Path) -> None:
    _, _, trainer = run
    trainer.save_model(str(tmp_path))
    again, batch = load_pruned(tmp_path).eval(), tiny_batch(trainer.model)
    assert torch.equal(logits(again, batch), logits(trainer.model, batch))
    options = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "max_new_tokens": 4}
    tokens = [again.generate(**options, use_cache=cached) for cached in (True, False)]
    assert torch.equal(*tokens)


@pytest.mark.parametrize("name", NAMES)
def test_sublayers_that_vanish_during_a_run(name: str, tmp_path: Path) -> None:
    """The attention of the first layer, or where that stays, of a later one."""
    gone = ["encoder.1.heads", "decoder.0.cross_heads"] if name == "t5" else ["layers.0.heads", "layers.1.neurons"]
    left = dict.fromkeys(gone, 0) | {HIDDEN: 12}
    target = target_of(tiny_model(name, LANGUAGE_MODELS[name]), left)
    scores = dict.fromkeys(gone, 0.0) | {HIDDEN: [0.0] * 4 + [1.0] * 12}
    trainer = _trainer(
        tmp_path, name, target_sparsity=target, num_pruning_events=1, options={"importance": Fixed(scores)}
    )
    trainer.train()
    assert trainer.pruner.plan.counts == {**trainer.pruner.dense_plan.counts, **left}
    assert counted_block_parameters(trainer) == events_of(tmp_path, "prune")[-1]["block_params"]
    trainer.save_model(str(tmp_path / "model"))
    batch = tiny_batch(trainer.model)
    assert torch.equal(logits(load_pruned(tmp_path / "model").eval(), batch), logits(trainer.model.eval(), batch))


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_the_distillation_loss_by_hand(name: str, tmp_path: Path) -> None:
    """Hidden states by their root mean square, real tokens of their own stack, mean over the stacks; predictions where
    a label is predicted."""
    trainer = _trainer(tmp_path, name, distillation_layer_map="static", distillation_layers=2)
    student, distillation, family = trainer.model.eval(), trainer.distillation, trainer.pruner.family
    batch = trainer._prepare_inputs(trainer.data_collator([trainer.train_dataset[i] for i in range(6)]))
    distillation.offer(student, 1.0)
    distillation.keep_transform(student, trainer.schedule, 4)
    alive = trainer.pruner.plan.alive_layers(trainer.pruner.sublayers)

    def loss() -> float:
        outputs = student(**batch, output_hidden_states=True)
        return distillation.loss(batch, outputs, distillation.teach(batch), student, family, alive, 4).item()

    assert loss() == pytest.approx(0.0, abs=1e-6)
    with torch.no_grad():
        for key, parameter in student.named_parameters():
            if ".lora_B." in key:  # of adapters, not of the transform
                parameter.normal_(0, 0.3)
        ours = student(**batch, output_hidden_states=True)
        theirs = distillation.teacher.forward(batch, output_hidden_states=True)
    labels = batch["labels"]
    shifted = F.pad(labels[:, 1:], (0, 1), value=-100) if name == "llama" else labels
    real = shifted != -100
    tau, s = trainer.args.distillation_temperature, trainer.args
    student_log, teacher_log = (F.log_softmax(out.logits[real] / tau, -1) for out in (ours, theirs))
    expected = s.prediction_weight * tau**2 * (teacher_log.exp() * (teacher_log - student_log)).sum(-1).mean()
    stacks = {"encoder": batch["attention_mask"], "decoder": labels != -100} if name == "t5" else {}
    stacks = stacks or {"decoder": batch["attention_mask"]}
    for stack, mask in stacks.items():
        mine, goal = layer_outputs(ours, stack), layer_outputs(theirs, stack)
        assert len(mine) == (LAYERS - 1 if name == "t5" and stack == "decoder" else LAYERS)
        for layer in (0, len(mine) - 1):
            a, b = (t[layer][mask.bool()] for t in (mine, goal))
            a, b = (t / (t.square().mean(-1, keepdim=True) + 1e-6).sqrt() for t in (a, b))
            expected += s.layer_weight * (a - b).square().mean() / len(stacks)
    assert loss() == pytest.approx(float(expected), rel=1e-4)


# ---------------------------------------------------------------------- from a recipe


@pytest.fixture(autouse=True)
def private_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def _copying(folder: Path, **changes: Any) -> Recipe:
    """Instruction tuning in which the completion repeats the last of eight words three times; 8 tokens a row."""
    draw = random.Random(0)
    prompts = [draw.choices(WORDS[:8], k=4) for _ in range(90)]
    rows = [{"prompt": " ".join(prompt), "completion": " ".join(prompt[-1:] * 3)} for prompt in prompts]
    settings = {"task": "instruction_tuning", "packing": True, "max_length": POSITIONS, **changes}
    return load_recipe(str(recipe(folder, rows, **settings)))


def test_packed_instruction_tuning_prunes_and_learns(tmp_path: Path) -> None:
    save_dense(tmp_path, "")
    given = _copying(tmp_path, max_steps=-1, num_train_epochs=6, per_device_train_batch_size=2, learning_rate=1e-2)
    before = evaluate(str(tmp_path / "model"), given)["validation_perplexity"]
    metrics = train(given)
    # 81 rows of training are 21 of 32 tokens; 3 of those choose the teacher, the other 18 are 9 batches
    assert metrics["train_steps"] == 54 and 0.4 <= metrics["sparsity"] < 0.43
    assert metrics["task_metric"] < 20 < before / 10  # 60 words would give 60 at random
    events = events_of(tmp_path / "out", "prune", "teacher")
    assert {record["kind"] for record in events} == {"prune", "teacher"}
    again = evaluate(str(tmp_path / "out"), given)
    assert again["validation_perplexity"] == pytest.approx(metrics["task_metric"], rel=1e-4)


def test_packing_is_refused_where_packed_rows_see_each_other(tmp_path: Path) -> None:
    config = tiny_config("opt")
    config.vocab_size, config.max_position_embeddings, config.pad_token_id = len(TOKENS), POSITIONS, 0
    model = OPTForCausalLM(config)
    randomise(model, seed=4)
    model.save_pretrained(tmp_path / "model")
    word_tokenizer().save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match="packing: true, but in OPTForCausalLM packed sequences would see each other"):
        train(_copying(tmp_path))
    assert not list((tmp_path / "out").glob("*"))
    assert train(_copying(tmp_path, packing=False))["train_steps"] == 12


def test_a_decoder_classifies_after_pruning(tmp_path: Path) -> None:
    save_dense(tmp_path, "")
    draw = random.Random(0)
    texts = [draw.choices(WORDS[:8], k=draw.randint(3, 9)) for _ in range(300)]
    rows = [{"text": " ".join(text), "label": "low" if text[-1] in WORDS[:4] else "high"} for text in texts]
    changes = {"task": "classification", "max_steps": 60, "learning_rate": 1e-2, "per_device_train_batch_size": 16}
    given = load_recipe(str(recipe(tmp_path, rows, **changes)))
    metrics = train(given)
    assert metrics["metric_name"] == "accuracy" and metrics["task_metric"] >= 0.85
    assert 0.4 <= metrics["sparsity"] < 0.43
    again = load_pruned(tmp_path / "out")
    assert type(again).__name__.endswith("LlamaForSequenceClassification") and again.config.pad_token_id == 0
    assert set(again.config.id2label.values()) == {"low", "high"}
    assert evaluate(str(tmp_path / "out"), given)["validation_accuracy"] == metrics["task_metric"]
