"""Tasks of lm_eval on a saved model with an encoder and a decoder, against numbers computed here in another way."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from texts import TOKENS, local_task, word_tokenizer, words
from tiny import parts, randomise
from tokenizers import processors
from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

from apt_trainer.evaluate.bootstrap import mean_interval
from apt_trainer.evaluate.harness import run_tasks
from apt_trainer.evaluate.saved import LanguageRequest, evaluate_language
from apt_trainer.plan.pruning_plan import PruningPlan
from apt_trainer.settings import ModelSettings
from apt_trainer.store.saved_model import as_pruned
from apt_trainer.surgery.cutting import apply_plan

EOS = 2
Rows = list[dict[str, Any]]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """As that of T5: no start token, and an end token behind every text."""
    of_words = word_tokenizer()
    of_words.bos_token = None
    end = processors.TemplateProcessing(single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", EOS)])
    of_words.backend_tokenizer.post_processor = end
    return of_words


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> tuple[Path, T5ForConditionalGeneration]:
    """A folder with a model that has lost neurons and a head, and the model."""
    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4}
    special = {"pad_token_id": 0, "eos_token_id": EOS, "decoder_start_token_id": 0}
    model = T5ForConditionalGeneration(T5Config(vocab_size=len(TOKENS), **sizes, **special))
    randomise(model, seed=5)
    family, spaces, dense = parts(model)
    lost = {space.name: dense.kept[space.name][1:] for space in spaces if space.kind in ("heads", "neurons")}
    plan = PruningPlan(dense.kept | lost)
    apply_plan(model, family, spaces, dense, plan)
    as_pruned(model, family, plan)
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder, model.eval()


def log_probability(model: T5ForConditionalGeneration, source: list[int], target: list[int]) -> float:
    """Of the target after the decoder's start token, one forward pass per token."""
    total = 0.0
    for end in range(len(target)):
        with torch.no_grad():
            decoder = torch.tensor([[0, *target[:end]]])
            logits = model(input_ids=torch.tensor([source]), decoder_input_ids=decoder).logits[0, -1].double()
        total += float(torch.log_softmax(logits, -1)[target[end]])
    return total


def own_task(folder: Path, name: str, rows: Rows, lines: str) -> str:
    data, file = folder / f"{name}.jsonl", folder / f"{name}.yaml"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    start = f"task: {name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{validation: {data}}}}}\n"
    file.write_text(f"{start}validation_split: validation\n{lines}")
    return str(file)


def test_choices_are_scored_by_the_decoder_after_the_context_in_the_encoder(
    saved: tuple[Path, Any], tokenizer: Any, tmp_path: Path
) -> None:
    folder, model = saved
    rows: Rows = [
        {
            "goal": words(2 + i % 5, i),
            "sol1": words(2 + i % 3, 50 + i),
            "sol2": words(5 - i % 4, 99 + i),
            "label": i % 2,
        }
        for i in range(12)
    ]
    pairs: Rows = [
        {"UID": "x", "sentence_good": words(5, 200 + i), "sentence_bad": words(5 + i % 2, 300 + i)} for i in range(8)
    ]
    tasks = [local_task(tmp_path, "piqa", rows), local_task(tmp_path, "blimp", pairs)]
    request = LanguageRequest(tasks=tasks, limit=10, batch_size=3, device="cpu")
    found = evaluate_language(ModelSettings(str(folder)), request)["lm_eval"]
    right: dict[str, list[bool]] = {"acc": [], "acc_norm": []}
    for row in rows[:10]:
        source = tokenizer(f"Question: {row['goal']}\nAnswer:").input_ids
        assert source[-1] == EOS
        choices = [row["sol1"], row["sol2"]]
        totals = [log_probability(model, source, tokenizer(c, add_special_tokens=False).input_ids) for c in choices]
        right["acc"].append(int(np.argmax(totals)) == row["label"])
        by_length = [total / len(choice) for total, choice in zip(totals, choices, strict=True)]
        right["acc_norm"].append(int(np.argmax(by_length)) == row["label"])
    for metric, hits in right.items():
        ends = found["my_piqa"]["metrics"][metric]
        assert 0 < sum(hits) < 10 and ends["value"] == pytest.approx(np.mean(hits))
        assert (ends["low"], ends["high"]) == pytest.approx(tuple(mean_interval(hits)))
    good = []
    for row in pairs:  # without a context the encoder reads the end token
        targets = [
            tokenizer(row[key], add_special_tokens=False).input_ids for key in ("sentence_good", "sentence_bad")
        ]
        good.append(np.argmax([log_probability(model, [EOS], target) for target in targets]) == 0)
    assert 0 < sum(good) < len(good)
    assert found["my_blimp"]["metrics"]["acc"]["value"] == pytest.approx(np.mean(good))


@pytest.mark.parametrize("batch_size", [1, 4])
def test_generated_answers_are_as_long_as_the_task_allows(
    saved: tuple[Path, Any], tokenizer: Any, tmp_path: Path, batch_size: int
) -> None:
    """Whatever the length of the question, and of the others in its batch."""
    _, model = saved
    rows: Rows = []
    for i in range(10):
        question = words(2 + i % 6, i)
        new = model.generate(**tokenizer(question, return_tensors="pt"), max_new_tokens=3, do_sample=False)
        answer = tokenizer.decode(new[0], skip_special_tokens=True)
        rows.append({"question": question, "answer": answer if i % 2 else answer + " w1"})
    assert sum(len(row["answer"].split()) == 3 for row in rows[1::2]) > 2  # that the limit cut short
    lines = (
        'output_type: generate_until\ndoc_to_text: "{{question}}"\ndoc_to_target: "{{answer}}"\n'
        'generation_kwargs: {until: ["\\n"], max_gen_toks: 3, do_sample: false}\n'
        "metric_list:\n  - {metric: exact_match, aggregation: mean, higher_is_better: true}\n"
    )
    found = run_tasks(model, tokenizer, [own_task(tmp_path, "copying", rows, lines)], batch_size=batch_size)
    metrics = found["copying"]["metrics"]["exact_match"]
    assert metrics["value"] == 0.5
    assert (metrics["low"], metrics["high"]) == pytest.approx(tuple(mean_interval([0, 1] * 5)))


def test_perplexity_of_a_text_is_that_of_the_decoder(saved: tuple[Path, Any], tokenizer: Any, tmp_path: Path) -> None:
    _, model = saved
    rows: Rows = [{"text": words(4 + i, i)} for i in range(5)]
    lines = (
        'output_type: loglikelihood_rolling\ndoc_to_text: ""\ndoc_to_target: "{{text}}"\n'
        "metric_list:\n  - {metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}\n"
    )
    found = run_tasks(model, tokenizer, [own_task(tmp_path, "texts", rows, lines)], batch_size=2)
    total = sum(log_probability(model, [EOS], tokenizer(row["text"]).input_ids) for row in rows)
    expected = math.exp(-total / sum(len(row["text"].split()) for row in rows))
    assert found["texts"]["metrics"]["word_perplexity"]["value"] == pytest.approx(expected, rel=1e-4)
