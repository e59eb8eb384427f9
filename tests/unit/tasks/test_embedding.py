"""Embedding models as a task: columns, batches of several texts a row, scores."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import losses, modules
from texts import word_tokenizer, words
from tiny import WIDTH, tiny_model
from transformers import EvalPrediction

from apt_trainer.errors import UserError
from apt_trainer.evaluate.task_intervals import score_intervals
from apt_trainer.settings import DataSettings
from apt_trainer.tasks import load_task
from apt_trainer.tasks.embedding import as_texts, embeddings_of, loss_of, retrieval_scores, similarity_scores

ROWS = [{"one": words(3 + row % 3, row), "two": words(5, row + 50), "label": row % 6 / 1.0} for row in range(20)]


def load(folder: Path, rows: list[dict[str, Any]], **settings: Any) -> Any:
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = {"task": "embedding", "train_file": str(file), "validation_file": str(file), "max_length": 16, **settings}
    return load_task(DataSettings(**given), word_tokenizer(), 0)


def unscored(rows: list[dict[str, Any]] = ROWS) -> list[dict[str, Any]]:
    return [{"one": row["one"], "two": row["two"]} for row in rows]


def predicted(rows: int, texts: int = 2, seed: int = 0) -> np.ndarray:
    found = np.random.default_rng(seed).normal(size=(rows, texts, 6))
    return found / np.linalg.norm(found, axis=-1, keepdims=True)


def test_a_batch_holds_the_texts_of_each_row(tmp_path: Path) -> None:
    data = load(tmp_path, ROWS)
    batch = data.collator([data.train[row] for row in range(3)])
    assert batch["input_ids"].shape[:2] == (3, 2) and batch["labels"].tolist() == [0.0, 1.0, 2.0]
    tokenizer, flat = word_tokenizer(), as_texts(batch)
    texts = [ROWS[row][name] for row in range(3) for name in ("one", "two")]
    alone = tokenizer(texts, padding=True, return_tensors="pt")
    assert torch.equal(flat["input_ids"], alone["input_ids"])
    assert torch.equal(flat["attention_mask"], alone["attention_mask"]) and "labels" not in flat
    assert data.metric_name == "spearman" and data.model_class == "AutoModel"
    triplets = load(tmp_path, [row | {"no": words(4, 3)} for row in unscored()], negative_column="no")
    assert triplets.collator([triplets.train[0]])["input_ids"].shape[:2] == (1, 3)
    assert (
        triplets.metric_name == "mrr" and load(tmp_path, unscored(), metric="recall_at_1").metric_name == "recall_at_1"
    )


def test_embeddings_and_losses_are_those_of_sentence_transformers(tmp_path: Path) -> None:
    model = tiny_model("bert", vocab_size=60).bert.eval()
    model.save_pretrained(tmp_path)
    word_tokenizer().save_pretrained(tmp_path)
    parts = [modules.Transformer(str(tmp_path)), modules.Pooling(WIDTH, "mean"), modules.Normalize()]
    library = SentenceTransformer(modules=parts, device="cpu")
    data = load(tmp_path, ROWS)
    batch = data.collator([data.train[row] for row in range(6)])
    with torch.no_grad():
        ours = embeddings_of(model(**as_texts(batch)).last_hidden_state, batch)
    for text, name in enumerate(("one", "two")):
        theirs = library.encode([row[name] for row in ROWS[:6]], convert_to_tensor=True)
        assert torch.allclose(ours[:, text], theirs, atol=1e-6)
    features = [library.preprocess([row[name] for row in ROWS[:6]]) for name in ("one", "two")]
    for scored, name in ((True, "CoSENTLoss"), (False, "MultipleNegativesRankingLoss")):
        with torch.no_grad():
            expected = getattr(losses, name)(library)([dict(feature) for feature in features], batch["labels"])
        found = loss_of(scored)(list(ours.unbind(1)), batch["labels"])
        assert float(found) == pytest.approx(float(expected), rel=1e-5)


def test_scores_of_pairs_and_their_intervals() -> None:
    embeddings, labels = predicted(40), np.arange(40) % 6 / 1.0
    cosines = [one @ two for one, two in embeddings]
    ranks = [np.argsort(np.argsort(values)).astype(float) for values in (cosines, labels)]
    found = similarity_scores(EvalPrediction(embeddings, labels))
    assert found["pearson"] == pytest.approx(np.corrcoef(cosines, labels)[0, 1])
    assert found["spearman"] == pytest.approx(np.corrcoef(*ranks)[0, 1], abs=0.05)  # these break ties
    given = ("embedding", "spearman", EvalPrediction(embeddings, labels), similarity_scores)
    intervals = score_intervals(*given)
    assert set(intervals) == set(found)
    assert all(intervals[name].low < found[name] < intervals[name].high for name in found)


def test_a_text_is_found_among_all_others() -> None:
    embeddings = predicted(30, texts=3, seed=1)
    embeddings[:10, 1] = embeddings[:10, 0]
    ranks = []
    for row in range(30):
        own = embeddings[row, 0] @ embeddings[row, 1]
        others = [embeddings[row, 0] @ embeddings[other, text] for other in range(30) for text in (1, 2)]
        ranks.append(1 + sum(value > own + 1e-6 for value in others))
    found = retrieval_scores(EvalPrediction(embeddings, np.zeros(30)))
    assert found["mrr"] == pytest.approx(np.mean([1 / rank for rank in ranks]))
    assert found["recall_at_1"] == pytest.approx(np.mean([rank == 1 for rank in ranks])) and found["recall_at_1"] > 0.3


@pytest.mark.parametrize(
    ("rows", "settings", "message"),
    [
        (unscored(), {"metric": "spearman"}, "is for pairs with scores, and these have none. Choose one of: mrr"),
        (ROWS, {"metric": "mrr"}, "is for pairs without scores, and these have some. Choose one of: spearman"),
        (unscored(), {"label_column": "lable"}, "label_column='lable' is not a column"),
        ([row | {"no": "a"} for row in ROWS], {"negative_column": "no"}, "makes triplets, which have no score"),
        ([row | {"no": "a"} for row in unscored()], {}, "have 3 columns of text .*Set text_column"),
        ([row | {"label": "much"} for row in ROWS], {}, "task: embedding needs finite numbers. Correct the data.$"),
        ([{"one": "a"}] * 3, {}, "have 1 columns of text"),
    ],
)
def test_data_that_cannot_be_learnt_from(
    rows: list[dict[str, Any]], settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        load(tmp_path, rows, **settings)


def test_other_tasks_have_no_negatives(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="negative_column='two' has no meaning for task: regression"):
        load(tmp_path, ROWS, task="regression", negative_column="two", text_column="one")
