"""The method on the Trainers of sentence-transformers: embedding models and cross-encoders."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import warm
from datasets import Dataset, DatasetDict
from sentence_transformers import CrossEncoder, SentenceTransformer
from sentence_transformers.cross_encoder.losses import BinaryCrossEntropyLoss, CrossEntropyLoss
from sentence_transformers.sentence_transformer import evaluation, losses, modules
from texts import word_tokenizer, words
from tiny import WIDTH, randomise, tiny_config, tiny_model
from torch.nn import functional as F
from transformers import AutoModelForSequenceClassification, set_seed

import apt_trainer
from apt_trainer import UserError
from apt_trainer.distillation.losses import embedding_loss
from integration.factories import SaveAt, events_of, losses_of, weights_of
from integration.test_any_trainer import PLAIN, SETTINGS
from integration.test_processes import two_processes

INSIDE: dict[str, Any] = {"prune_targets": ["heads", "neurons"]}
BEFORE: dict[str, Any] = {**PLAIN, "pruning_time": "before", "pruning_start": None, "calibration_samples": 16}
TEXTS = [words(6, row) for row in range(4)]
PAIRS = [{"a": words(4 + row % 4, row), "b": words(5, row + 70)} for row in range(48)]
SCORED = [{**pair, "score": row % 10 / 10} for row, pair in enumerate(PAIRS)]


def dense(folder: Path, model: str = "bert", pooling: str = "mean") -> Any:
    folder.mkdir(parents=True, exist_ok=True)
    tiny_model(model, vocab_size=60).base_model.save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    word = modules.Transformer(str(folder), max_seq_length=16)
    parts = [word, modules.Pooling(WIDTH, pooling), modules.Normalize()]
    return SentenceTransformer(modules=parts, device="cpu")


def loss_of(name: str, model: Any) -> Any:
    if name == "Matryoshka":
        return losses.MatryoshkaLoss(model, losses.CoSENTLoss(model), [WIDTH, WIDTH // 2])
    return getattr(losses, name)(model)


def embeddings(
    folder: Path, steps: tuple[int, ...] = (), loss: str = "CoSENTLoss", options: Any = None, **changes: Any
) -> Any:
    given = dict(options or {})
    model = given.pop("model", None) or dense(folder / "dense")
    rows = PAIRS if loss == "MultipleNegativesRankingLoss" else SCORED
    set_seed(3)
    trainer_class = apt_trainer.APTSentenceTransformerTrainer
    args = trainer_class.Config(str(folder), **{**SETTINGS, **INSIDE, **changes})
    given = {"train_dataset": Dataset.from_list(rows), "loss": loss_of(loss, model), **given}
    return trainer_class(model, args=args, callbacks=[SaveAt(steps)], **given)


def pairs(folder: Path, steps: tuple[int, ...] = (), labels: int = 1, options: Any = None, **changes: Any) -> Any:
    start = folder / "dense"
    if not start.exists():
        made = AutoModelForSequenceClassification.from_config(tiny_config("bert", vocab_size=60, num_labels=labels))
        randomise(made, seed=1)
        made.save_pretrained(start)
        word_tokenizer().save_pretrained(start)
    model = CrossEncoder(str(start), device="cpu", max_length=24)
    rows = [{**pair, "label": row % 3 if labels > 1 else row % 10 / 10} for row, pair in enumerate(PAIRS)]
    set_seed(3)
    trainer_class = apt_trainer.APTCrossEncoderTrainer
    args = trainer_class.Config(str(folder), **{**SETTINGS, **changes})
    loss = CrossEntropyLoss(model) if labels > 1 else BinaryCrossEntropyLoss(model)
    given = {"train_dataset": Dataset.from_list(rows), "loss": loss, **(options or {})}
    return trainer_class(model, args=args, callbacks=[SaveAt(steps)], **given)


def outputs(model: Any) -> torch.Tensor:
    if isinstance(model, CrossEncoder):
        return model.predict([(text, TEXTS[0]) for text in TEXTS], convert_to_tensor=True)
    return model.encode(TEXTS, convert_to_tensor=True)


def of_equal_weights(one: Any, other: Any) -> bool:
    theirs = weights_of(other.model)
    return all(torch.equal(value, theirs[name]) for name, value in weights_of(one.model).items())


ALONE = """
import json, sys
from sentence_transformers import CrossEncoder, SentenceTransformer
texts, found = json.loads(sys.argv[1]), []
for kind, path in ((SentenceTransformer, sys.argv[2]), (CrossEncoder, sys.argv[3])):
    model = kind(path, device="cpu", trust_remote_code=True)
    given = [(text, texts[0]) for text in texts]
    found.append((model.predict(given) if kind is CrossEncoder else model.encode(texts)).tolist())
assert "apt_trainer" not in sys.modules
print(json.dumps(found))
"""


def assert_loads(trainer: Any, folder: Path) -> None:
    """The saved folder holds a smaller model of equal outputs; the library loads it by itself too."""
    trainer.save_model(str(folder / "model"))
    kind = type(trainer.model)
    loaded, start = (kind(str(folder / name), device="cpu") for name in ("model", "dense"))
    assert torch.equal(outputs(trainer.model), outputs(loaded))
    parameters = [sum(p.numel() for p in model.parameters()) for model in (loaded, start)]
    assert parameters[0] < 0.95 * parameters[1] and trainer.pruner.sparsity() >= 0.4


# ---------------------------------------------------------------------------- embedding models


@pytest.mark.parametrize("loss", ["CosineSimilarityLoss", "MultipleNegativesRankingLoss", "CoSENTLoss", "Matryoshka"])
def test_an_embedding_model_is_pruned_and_loads_with_equal_embeddings(loss: str, tmp_path: Path) -> None:
    trainer = embeddings(tmp_path, (4,), loss)
    trainer.train()
    assert {len(values) for values in losses_of(trainer).values()} == {2, 3}  # task and loss; distance to a teacher
    assert events_of(tmp_path, "teacher") and max(events_of(tmp_path, "prune")[-1]["ranks"].values()) > 2
    assert_loads(trainer, tmp_path)
    resumed = embeddings(tmp_path / "resumed", (), loss)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert of_equal_weights(trainer, resumed)


@pytest.mark.parametrize(
    "changes", [BEFORE, {"bf16": True}, {"gradient_checkpointing": True}, {"gradient_accumulation_steps": 2}]
)
def test_an_embedding_model_is_pruned_in_other_ways(changes: dict[str, Any], tmp_path: Path) -> None:
    trainer = embeddings(tmp_path, **changes)
    trainer.train()
    assert_loads(trainer, tmp_path)
    before = changes is BEFORE
    assert bool(events_of(tmp_path, "teacher")) is not before
    assert not before or events_of(tmp_path, "prune")[0]["loss_before"] is not None


@pytest.mark.parametrize(
    ("changes", "said"), [({}, True), ({"distillation": "none"}, False), ({"layer_weight": 0.0}, False)]
)
def test_that_layers_are_not_compared_is_said_at_the_start(
    changes: dict[str, Any], said: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    embeddings(tmp_path, **changes)
    sentence = "its embeddings are compared with the teacher's, its layers are not"
    assert (sentence in caplog.text) is said


@pytest.mark.parametrize("pooling", ["mean", "cls", "max"])
def test_what_is_compared_with_the_teacher_are_sentence_embeddings(pooling: str, tmp_path: Path) -> None:
    """Against a computation of its own: 1 − cos of what both models encode, mean over all texts of a batch."""
    teacher = dense(tmp_path / "teacher", pooling=pooling)
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.add_(0.05)
    options = {"model": dense(tmp_path / "dense", pooling=pooling), "teacher": teacher}
    taught = {"distillation": "model", "teacher_name_or_path": "x", "distillation_start": 0}
    trainer = embeddings(tmp_path, options=options, **taught)
    batch = trainer.data_collator([trainer.train_dataset[row] for row in range(4)])
    features, _ = trainer.collect_features(batch)
    with trainer.micro_batches._watched(batch, True) as passes:
        trainer.compute_loss(trainer.model.train(), dict(batch))
    family, alive = trainer.pruner.family, trainer.pruner.plan.alive_layers(trainer.pruner.sublayers)
    found = [
        trainer.distillation.loss(one.inputs, one.outputs, one.taught, trainer.transformer, family, alive, 0)
        for one in passes
    ]
    assert len(passes) == 2
    for one, feature in zip(found, features, strict=True):
        ours, theirs = (each.eval()(dict(feature))["sentence_embedding"] for each in (trainer.model, teacher))
        expected = 1 - F.cosine_similarity(ours, theirs).mean()
        assert float(one) == pytest.approx(float(expected), rel=1e-4) and float(one) > 1e-4


def test_the_distance_of_embeddings_leaves_padding_out() -> None:
    generator = torch.Generator().manual_seed(0)
    ours, theirs = (torch.randn(2, 3, 5, generator=generator) for _ in range(2))
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    real = [(0, 0), (0, 1), (1, 0)]
    expected = sum(1 - F.cosine_similarity(ours[i, j], theirs[i, j], dim=0) for i, j in real) / 3
    assert float(embedding_loss(ours, theirs, mask)) == pytest.approx(float(expected))
    ours[0, 2] = torch.nan
    assert float(embedding_loss(ours, theirs, mask)) == pytest.approx(float(expected))


def test_each_text_says_which_of_its_tokens_are_real(tmp_path: Path) -> None:
    """sentence-transformers calls ``forward`` of the transformer by itself, so that its hooks are not called."""
    trainer, told = embeddings(tmp_path), []
    tell = trainer.pruner.set_tokens
    trainer.pruner.set_tokens = lambda tokens: (told.append(tokens), tell(tokens))[1]
    trainer.train()
    masks = [mask for mask in told if mask is not None]
    assert len(masks) >= 16 and any((mask == 0).any() for mask in masks)


def test_an_evaluator_is_not_run_to_choose_a_teacher(tmp_path: Path) -> None:
    rows = SCORED[:8]
    texts = [[row[name] for row in rows] for name in ("a", "b", "score")]
    evaluator = evaluation.EmbeddingSimilarityEvaluator(*texts, name="sts")
    trainer = embeddings(tmp_path, options={"evaluator": evaluator}, eval_strategy="steps", eval_steps=4)
    trainer.train()
    found = [entry for entry in trainer.state.log_history if "eval_sts_spearman_cosine" in entry]
    assert len(found) == 2 and len(events_of(tmp_path, "teacher")) >= 1
    written = (tmp_path / "eval" / "similarity_evaluation_sts_results.csv").read_text().splitlines()
    assert len(written) == 3  # a header and two evaluations


def test_several_data_sets_need_one_held_out(tmp_path: Path) -> None:
    data = DatasetDict({"one": Dataset.from_list(SCORED[:24]), "two": Dataset.from_list(SCORED[24:])})
    with pytest.raises(UserError, match="train_dataset holds several data sets, of which no rows are split off"):
        embeddings(tmp_path, options={"train_dataset": data})
    given = {"train_dataset": data, "heldout_dataset": Dataset.from_list(SCORED[:8])}
    trainer = embeddings(tmp_path, options=given)
    trainer.train()
    assert_loads(trainer, tmp_path)


def test_a_loss_with_a_backward_pass_of_its_own_cannot_be_taught(tmp_path: Path) -> None:
    cached = "CachedMultipleNegativesRankingLoss"
    data = {"train_dataset": Dataset.from_list(PAIRS)}
    trainer = embeddings(tmp_path, (), cached, data)
    with pytest.raises(UserError, match="or set distillation: none"):
        trainer.train()


# ---------------------------------------------------------------------------- cross-encoders


@pytest.mark.parametrize(("labels", "changes"), [(1, {}), (3, {}), (1, {"bf16": True}), (1, BEFORE)])
def test_a_cross_encoder_is_pruned_and_loads_with_equal_scores(
    labels: int, changes: dict[str, Any], tmp_path: Path
) -> None:
    trainer = pairs(tmp_path, (4,), labels, **changes)
    trainer.train()
    assert bool(events_of(tmp_path, "teacher")) is (changes is not BEFORE)
    assert_loads(trainer, tmp_path)
    if not changes:
        resumed = pairs(tmp_path / "resumed", (), labels)
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
        assert of_equal_weights(trainer, resumed)


def test_both_load_where_this_package_is_not_imported(tmp_path: Path) -> None:
    trainers = [made(tmp_path / made.__name__) for made in (embeddings, pairs)]
    paths = [str(tmp_path / f"model{number}") for number in range(2)]
    for trainer, path in zip(trainers, paths, strict=True):
        trainer.train()
        trainer.save_model(path)
    command = [warm.python(warm.LIBRARIES), "-c", ALONE, json.dumps(TEXTS), *paths]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    for trainer, found in zip(trainers, json.loads(done.stdout.splitlines()[-1]), strict=True):
        assert torch.allclose(torch.tensor(found), outputs(trainer.model), atol=1e-6)


# ---------------------------------------------------------------------------- two processes

WORKER = """
import json, os, sys
sys.path[:0] = [{root!r}, {tests!r}]
from pathlib import Path
import torch
torch.set_num_threads(1)
from integration import test_embedding_trainers as here
from integration.factories import losses_of

folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
found = {{}}
for name in ("of_embeddings", "of_pairs"):
    trainer = getattr(here, name)(folder / f"{{name}}-{{rank}}", 2, ddp_backend="gloo")
    trainer.train()
    found[name] = {{"losses": losses_of(trainer), "sparsity": trainer.pruner.sparsity()}}
assert trainer.args.world_size == 2
(folder / f"result.{{rank}}.json").write_text(json.dumps(found))
os._exit(0)
"""


def of_embeddings(folder: Path, size: int, **changes: Any) -> Any:
    """A loss that is a mean over rows, so that two halves of a batch are one."""
    return embeddings(folder, (), "CosineSimilarityLoss", **_of_processes(size), **changes)


def of_pairs(folder: Path, size: int, **changes: Any) -> Any:
    return pairs(folder, **_of_processes(size), **changes)


def _of_processes(size: int) -> dict[str, Any]:
    return {"per_device_train_batch_size": size, "max_grad_norm": 0.0, "dataloader_drop_last": True}


@pytest.mark.distributed
def test_two_processes_train_as_one(tmp_path: Path) -> None:
    for rank in (0, 1):
        of_pairs(tmp_path / f"of_pairs-{rank}", 4)  # once processes have joined, the second saves no model
    two_processes(tmp_path, WORKER, "result.0.json", "result.1.json")
    for name, of in (("of_embeddings", of_embeddings), ("of_pairs", of_pairs)):
        alone = of(tmp_path / f"{name}-alone", 4)
        alone.train()
        for rank in (0, 1):
            found = json.loads((tmp_path / f"result.{rank}.json").read_text())[name]
            assert found["sparsity"] == alone.pruner.sparsity()
            for step, values in losses_of(alone).items():
                assert found["losses"][str(step)] == pytest.approx(values, rel=1e-3, abs=1e-6), (name, step)
