"""Loading, perplexity, tasks of lm_eval and intervals, against numbers computed here in another way."""

from __future__ import annotations

import copy
import json
import math
import sys
from functools import partial
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from lm_eval.tasks import TaskManager
from texts import TOKENS, WORDS, llama_config, local_task, tiny_llama, word_tokenizer, words
from tiny import gap, randomise, tiny_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BertForSequenceClassification,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from apt_trainer.errors import UserError
from apt_trainer.evaluate import bootstrap, harness
from apt_trainer.evaluate.bootstrap import mean_interval
from apt_trainer.evaluate.harness import check_tasks, run_tasks
from apt_trainer.evaluate.perplexity import perplexity
from apt_trainer.evaluate.saved import LanguageRequest, evaluate_language
from apt_trainer.runs.run import evaluate
from apt_trainer.settings import ModelSettings
from apt_trainer.settings.recipe import load_recipe
from apt_trainer.store.pretrained import (
    Source,
    choose_device,
    find_source,
    load_config,
    load_dense_shape,
    load_saved,
    load_tokenizer,
    read_config,
)
from apt_trainer.store.saved_model import PREFIX, config_class, model_class


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    return tiny_llama()


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return word_tokenizer()


@torch.no_grad()
def log_probabilities(model: LlamaForCausalLM, ids: list[int]) -> list[float]:
    """log p of every token but the first, given all before it: one forward pass per token."""
    found = []
    for end in range(1, len(ids)):
        logits = model(input_ids=torch.tensor([ids[:end]])).logits[0, -1].double()
        found.append(float(torch.log_softmax(logits, -1)[ids[end]]))
    return found


# ---------------------------------------------------------------------------------------------- intervals


def test_interval_of_many_examples_is_that_of_a_normal_mean():
    right = np.arange(400) % 4 != 0
    low, high = mean_interval(right)
    deviation = math.sqrt(0.75 * 0.25 / 400)
    assert low == pytest.approx(0.75 - 1.96 * deviation, abs=0.006)
    assert high == pytest.approx(0.75 + 1.96 * deviation, abs=0.006)
    assert mean_interval(right) == (low, high) != mean_interval(right, seed=1)
    narrow = mean_interval(right, confidence=0.5)
    assert low < narrow.low < 0.75 < narrow.high < high


def test_interval_weighs_examples():
    values, weights = np.array([1.0, 3.0, 8.0]), np.array([1.0, 1.0, 1e-12])
    low, high = mean_interval(values, weights)
    assert (low, high) == pytest.approx((1.0, 3.0), abs=1e-6) or high == pytest.approx(8.0)
    draws = np.random.default_rng(0).integers(3, size=(bootstrap.RESAMPLES, 3))
    means = [np.average(values[row], weights=weights[row]) for row in draws]
    assert (low, high) == pytest.approx(tuple(np.quantile(means, (0.025, 0.975))), rel=1e-9)


def test_interval_does_not_depend_on_what_is_held_at_a_time(monkeypatch):
    values = np.random.default_rng(3).normal(size=50)
    whole = mean_interval(values, resamples=301)
    monkeypatch.setattr(bootstrap, "CELLS", 50 * 100)
    assert mean_interval(values, resamples=301) == pytest.approx(whole, rel=1e-12)
    with pytest.raises(UserError, match="no examples"):
        mean_interval([])


# ---------------------------------------------------------------------------------------------- perplexity


@pytest.mark.parametrize("batch_size", [1, 3])
def test_perplexity_without_overlap(llama, tokenizer, batch_size):
    text = words(50)
    ids = tokenizer(text)["input_ids"]
    expected = [
        log_probabilities(llama, ids[start : start + 8]) for start in range(0, 50, 8)
    ]  # the last are two words
    result = perplexity(llama, tokenizer, text, window=8, batch_size=batch_size)
    assert result.nll == pytest.approx([-np.mean(window) for window in expected], rel=1e-5)
    assert result.counts == (*(7,) * 6, 1)
    assert result.value == pytest.approx(math.exp(-np.mean(sum(expected, []))), rel=1e-5)
    low, high = result.interval()
    assert min(result.nll) < math.log(low) < math.log(result.value) < math.log(high) < max(result.nll)


@pytest.mark.parametrize("stride", [1, 3, 5, 7])
def test_perplexity_with_a_stride_predicts_every_token_once(llama, tokenizer, stride):
    ids = tokenizer(words(29))["input_ids"]
    result = perplexity(llama, tokenizer, words(29), window=8, stride=stride, batch_size=2)
    expected = log_probabilities(llama, ids[:8])
    for start in range(stride, 29 - 8 + stride, stride):
        end = min(29, start + 8)
        expected += log_probabilities(llama, ids[start:end])[start - stride + 8 - end :]
    assert result.predicted_tokens == 28 == len(expected)
    assert result.value == pytest.approx(math.exp(-np.mean(expected)), rel=1e-5)


def test_perplexity_with_a_start_token_predicts_the_first_word_too(llama, tokenizer):
    ids = tokenizer(words(21))["input_ids"]
    expected = [log_probabilities(llama, [1, *ids[start : start + 7]]) for start in (0, 7, 14)]
    result = perplexity(llama, tokenizer, words(21), window=8, start_token=True)
    assert result.counts == (7, 7, 7)
    assert result.value == pytest.approx(math.exp(-np.mean(expected)), rel=1e-5)


def test_perplexity_uses_the_first_tokens_only_and_leaves_the_model_alone(tokenizer):
    model = tiny_llama(attention_dropout=0.5).train()
    model.model.layers[1].eval()
    result = perplexity(model, tokenizer, words(100), window=8, max_tokens=24)
    assert result.nll == perplexity(model, tokenizer, words(24), window=8).nll
    assert len(result.nll) == 3
    assert model.training and model.model.layers[0].training and not model.model.layers[1].training


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"window": 51}, "window=51 must be at least 2 and at most the 32 positions"),
        ({"window": 1}, "window=1 must be at least 2"),
        ({"window": 20, "max_tokens": 1}, "The text has 1 tokens, so nothing is predicted"),
        ({"window": 8, "stride": 9}, "stride=9 must lie between 1 and the window of 8"),
        ({"window": 8, "batch_size": 0}, "batch_size=0 must be at least 1"),
    ],
)
def test_perplexity_refuses_sizes_that_cannot_work(llama, tokenizer, changes, message):
    with pytest.raises(UserError, match=message):
        perplexity(llama, tokenizer, words(50), **changes)


def test_perplexity_of_broken_weights_is_an_error(tokenizer):
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[3, 5] = float("nan")
    with pytest.raises(UserError, match="The loss of window 0 is nan"):
        perplexity(model, tokenizer, words(20), window=8)


def test_perplexity_needs_a_decoder(tokenizer):
    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=60, **sizes))
    for model in (t5, tiny_model("bert", "ForMaskedLM")):
        with pytest.raises(UserError, match="needs a decoder with a language-model head"):
            perplexity(model, tokenizer, words(20), window=8)
    with pytest.raises(UserError, match="no start token"):
        bare = copy.deepcopy(tokenizer)
        bare.bos_token = None
        perplexity(tiny_llama(), bare, words(20), window=8, start_token=True)


# ---------------------------------------------------------------------------------------------- lm_eval


@pytest.fixture(scope="module")
def task_files(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str, list[dict], list[dict]]:
    folder = tmp_path_factory.mktemp("tasks")
    piqa = [
        {"goal": words(4, i), "sol1": words(2 + i % 3, 50 + i), "sol2": words(5 - i % 4, 99 + i), "label": i % 2}
        for i in range(12)
    ]
    blimp = [
        {"UID": "x", "sentence_good": words(5, 200 + i), "sentence_bad": words(5 + i % 2, 300 + i)} for i in range(8)
    ]
    return local_task(folder, "piqa", piqa), local_task(folder, "blimp", blimp), piqa, blimp


def choose(model, tokenizer, context: str, choices: list[str], by_length: bool = False) -> int:
    """Which choice is the likeliest after the context; a task without context starts from the start token."""
    scores = []
    before = tokenizer(context)["input_ids"] if context else [1]
    for choice in choices:
        after = tokenizer(choice)["input_ids"]
        total = sum(log_probabilities(model, before + after)[len(before) - 1 :])
        scores.append(total / len(choice) if by_length else total)
    return int(np.argmax(scores))


def test_task_scores_are_those_of_own_log_likelihoods(llama, tokenizer, task_files):
    piqa_file, blimp_file, piqa, blimp = task_files
    found = run_tasks(llama, tokenizer, [piqa_file, blimp_file], limit=10, batch_size=4)
    right: dict[str, list[bool]] = {"acc": [], "acc_norm": []}
    for row in piqa[:10]:
        for metric, hits in right.items():
            prompt, choices = f"Question: {row['goal']}\nAnswer:", [row["sol1"], row["sol2"]]
            hits.append(choose(llama, tokenizer, prompt, choices, metric == "acc_norm") == row["label"])
    assert found["my_piqa"]["examples"] == 10
    for metric, hits in right.items():
        assert 0 < sum(hits) < 10  # or the two could agree by chance
        assert found["my_piqa"]["metrics"][metric]["value"] == pytest.approx(np.mean(hits))
        ends = found["my_piqa"]["metrics"][metric]
        assert (ends["low"], ends["high"]) == pytest.approx(tuple(mean_interval(hits)))
    good = [choose(llama, tokenizer, "", [row["sentence_good"], row["sentence_bad"]]) == 0 for row in blimp]
    assert found["my_blimp"]["examples"] == len(blimp)
    assert found["my_blimp"]["metrics"]["acc"]["value"] == pytest.approx(np.mean(good))
    assert 0 < sum(good) < len(good)


def test_shipped_tasks_are_found_by_name_and_say_when_their_data_are_missing(llama, tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for check in (partial(run_tasks, llama, tokenizer), check_tasks):
        with pytest.raises(UserError, match="blimp/sample.jsonl. Set the environment variable APT_TASK_DATA"):
            check(["blimp_local"])


def test_unknown_task_names_the_nearest(llama, tokenizer, monkeypatch):
    local = partial(TaskManager, include_defaults=False)  # reading those of lm_eval takes long
    monkeypatch.setattr("lm_eval.tasks.TaskManager", lambda include_path, **_: local(include_path=include_path))
    with pytest.raises(UserError, match="'piqa_lokal' is neither .* Did you mean 'piqa_local'"):
        run_tasks(llama, tokenizer, ["piqa_lokal"])


def test_tasks_refuse_what_cannot_run(llama, tokenizer, tmp_path, monkeypatch):
    for changes, message in (
        ({"tasks": []}, "No task of lm_eval is named"),
        ({"task_path": str(tmp_path / "none")}, "is not a folder"),
        ({"limit": 0}, "limit=0 must be at least 1"),
    ):
        with pytest.raises(UserError, match=message):
            run_tasks(llama, tokenizer, **{"tasks": ["piqa_local"], **changes})
    with pytest.raises(UserError, match="BertForSequenceClassification is no language model"):
        run_tasks(tiny_model("bert"), tokenizer, ["piqa_local"])
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UserError, match=r"pip install 'apt-trainer\[lm_eval\]'"):
        run_tasks(llama, tokenizer, ["piqa_local"])


def test_scores_that_are_no_mean_of_examples_get_no_interval():
    samples = [{"doc_id": i, "filter": "none", "acc": float(i > 1), "word_perplexity": 2.0} for i in range(4)]
    summary = harness._summary({"alias": "x", "acc,none": 0.5, "acc_stderr,none": "N/A", "f1,none": 0.3}, samples, 0)
    assert summary["examples"] == 4
    assert set(summary["metrics"]) == {"acc", "f1"}
    assert set(summary["metrics"]["acc"]) == {"value", "low", "high"}
    assert summary["metrics"]["f1"] == {"value": 0.3}
    assert harness._summary({"acc,strict": 0.25}, samples, 0)["metrics"] == {"acc (strict)": {"value": 0.25}}


# ---------------------------------------------------------------------------------------------- loading


def test_sources(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "a.gguf").write_bytes(b"GGUF")
    (tmp_path / "folder.gguf").mkdir()
    file = tmp_path / "models" / "a.gguf"
    assert find_source(str(file)) == Source(str(tmp_path / "models"), "a.gguf")
    assert find_source("models/a.gguf") == find_source("models", "a.gguf") == Source("models", "a.gguf")
    assert find_source("folder.gguf") == Source("folder.gguf")
    assert find_source("owner/name.gguf") == Source("owner/name.gguf")
    assert find_source("owner/name/b.gguf") == Source("owner/name", "b.gguf")
    for given, message in (
        (("models/a.gguf", "b.gguf"), "one GGUF file and gguf_file='b.gguf' another"),
        (("models", "b.gguf"), "holds no file 'b.gguf'. GGUF files there: a.gguf"),
        (("c.gguf",), "holds no file 'c.gguf'"),
    ):
        with pytest.raises(UserError, match=message):
            find_source(*given)


@pytest.mark.parametrize(("dtype", "refused"), [("float32", True), ("auto", True), ("bfloat16", False)])
def test_flash_attention_in_float32_is_refused_before_weights_load(tmp_path, dtype, refused):
    llama_config().save_pretrained(tmp_path)
    settings = ModelSettings(str(tmp_path), dtype=dtype, attn_implementation="flash_attention_4")
    if not refused:
        assert read_config(settings).model_type == "llama"
        return
    with pytest.raises(UserError, match=r"'flash_attention_4' computes in bfloat16 .* Set dtype: bfloat16"):
        read_config(settings)


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, r"quantised with bitsandbytes \(4 bits\)"),
        ({"quant_method": "gptq", "bits": 8}, r"quantised with gptq \(8 bits\)"),
        ({"quant_method": "awq", "bits": 4, "group_size": 128}, r"quantised with awq \(4 bits\)"),
    ],
)
def test_quantised_weights_are_refused_before_they_load(tmp_path, quantization, message):
    values = llama_config().to_dict() | {"quantization_config": quantization}
    (tmp_path / "config.json").write_text(json.dumps(values))  # no weights here: they could not be loaded
    with pytest.raises(UserError, match=f"{message}, which cannot be cut"):
        load_config(ModelSettings(str(tmp_path)))


def write_gguf(path: Path, model: LlamaForCausalLM, quantised: dict[str, torch.Tensor]) -> None:
    """The model as a GGUF file with 4-bit blocks; ``quantised`` is filled with what the blocks hold."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*TOKENS[:-2], "w", "0"])
    writer.add_token_types([3] * 4 + [1] * len(WORDS))
    writer.add_token_merges(["w 0"])
    for name, token in (("bos", 1), ("eos", 2), ("unk", 3), ("pad", 0)):
        getattr(writer, f"add_{name}_token_id")(token)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for full, parameter in model.state_dict().items():
        values = parameter.numpy()
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(full.split(".")[-2])
        if heads:  # llama.cpp keeps the two halves of each head interleaved
            values = values.reshape(heads, 2, -1, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
        target = names.get_name(full, try_suffixes=(".weight",))
        if values.ndim == 1:
            writer.add_tensor(target, values)
            continue
        blocks = gguf.quantize(np.ascontiguousarray(values), gguf.GGMLQuantizationType.Q4_1)
        writer.add_tensor(target, blocks, raw_dtype=gguf.GGMLQuantizationType.Q4_1)
        back = gguf.dequantize(blocks, gguf.GGMLQuantizationType.Q4_1)
        if heads:
            back = back.reshape(heads, -1, 2, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
        quantised[full] = torch.from_numpy(back.copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, LlamaForCausalLM, dict[str, torch.Tensor]]:
    model, quantised = tiny_llama(), {}
    path = tmp_path_factory.mktemp("gguf") / "tiny.Q4_1.gguf"
    write_gguf(path, model, quantised)
    return path, model, quantised


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gguf_weights_are_plain_tensors_of_the_asked_type(gguf_file, dtype, tmp_path):
    path, original, quantised = gguf_file
    settings = ModelSettings(str(path), dtype=dtype)
    config, model = load_config(settings), load_saved(settings)
    assert (config.hidden_size, config.num_key_value_heads) == (32, 2)
    kind = getattr(torch, dtype)
    assert {p.dtype for p in model.parameters()} == {kind}
    assert all(p.requires_grad for p in model.parameters())
    for name, value in model.state_dict().items():
        expected = quantised.get(name, original.state_dict()[name])
        assert torch.equal(value, expected.to(kind)), name
    assert gap(quantised["lm_head.weight"], original.lm_head.weight.detach()) > 1e-3  # 4 bits do lose something
    model.save_pretrained(tmp_path)  # nothing quantised is left in the model, or this would be refused
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.dtype == kind and not hasattr(again.config, "quantization_config")
    ids = torch.tensor([[5, 9, 30, 7]])
    assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)


def test_gguf_tokenizer_and_folder_with_a_file_name(gguf_file):
    path, _, _ = gguf_file
    settings = ModelSettings(str(path.parent), gguf_file=path.name)
    tokenizer = load_tokenizer(settings)
    assert (tokenizer.bos_token, tokenizer.pad_token, tokenizer.eos_token_id) == ("<s>", "<pad>", 2)
    assert tokenizer.convert_tokens_to_ids(["w0", "w53"]) == [4, 57]
    assert load_config(settings).vocab_size == len(TOKENS)


def test_gguf_errors_are_one_sentence(gguf_file, tmp_path):
    path, _, _ = gguf_file
    with pytest.raises(UserError, match=r"dtype='int8' is not one of .* de-quantised when they load"):
        load_config(ModelSettings(str(path), dtype="int8"))
    (tmp_path / "broken.gguf").write_bytes(b"no such thing")
    with pytest.raises(UserError, match=r"broken\.gguf could not be loaded"):
        load_config(ModelSettings(str(tmp_path / "broken.gguf")))


@pytest.fixture
def pruned_llama(tmp_path: Path) -> Path:
    """A saved decoder whose second layer has 24 of its 64 neurons."""
    dense = tiny_llama()
    values = dense.config.to_dict()
    values.pop("model_type")
    sizes = {"gate_proj": "out_features", "up_proj": "out_features", "down_proj": "in_features"}
    path = "model.layers.1.mlp."
    shapes = {f"{path}{name}.weight": [32, 24] if name == "down_proj" else [24, 32] for name in sizes}
    attributes = {path + name: {attribute: 24} for name, attribute in sizes.items()}
    structure = {"replaced": {}, "parameters": shapes, "attributes": attributes}
    AutoConfig.register(PREFIX + "llama", config_class("llama"), exist_ok=True)
    config = config_class("llama")(**values, apt_base_architecture="LlamaForCausalLM", apt_structure=structure)
    model = model_class("LlamaForCausalLM")(config)
    randomise(model, seed=5)
    model.save_pretrained(tmp_path / "pruned")
    word_tokenizer().save_pretrained(tmp_path / "pruned")
    return tmp_path / "pruned"


def test_pruned_decoder_is_evaluated_like_any_other(pruned_llama, task_files, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(words(40))
    settings = ModelSettings(str(pruned_llama))
    model = load_saved(settings)
    assert model.model.layers[1].mlp.up_proj.weight.shape == (24, 32)
    request = LanguageRequest(text=str(text), window=8, tasks=[task_files[1]], limit=3, device="cpu")
    found = evaluate_language(settings, request)
    ids = word_tokenizer()(words(40))["input_ids"]
    expected = [log_probabilities(model, ids[start : start + 8]) for start in range(0, 40, 8)]
    assert found["perplexity"]["value"] == pytest.approx(math.exp(-np.mean(expected)), rel=1e-5)
    assert (found["perplexity"]["windows"], found["perplexity"]["predicted_tokens"]) == (5, 35)
    assert found["perplexity"]["low"] < found["perplexity"]["value"] < found["perplexity"]["high"]
    assert found["lm_eval"]["my_blimp"]["examples"] == 3
    assert found["parameters"] == sum(p.numel() for p in tiny_llama().parameters()) - 3 * 32 * 40
    json.dumps(found)
    dense = load_dense_shape(ModelSettings(str(pruned_llama), dtype="bfloat16"))
    assert type(dense) is LlamaForCausalLM and dense.dtype == torch.bfloat16
    shapes = {name: value.shape for name, value in dense.state_dict().items()}
    assert shapes == {name: value.shape for name, value in tiny_llama().state_dict().items()}


def test_folder_without_a_tokenizer_or_config_is_an_error(tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="could not be loaded"):
        load_tokenizer(ModelSettings(str(tmp_path)))
    (tmp_path / "config.json").write_text('{"model_type": "no such type"}')
    with pytest.raises(UserError, match="could not be loaded: .*no such type"):
        load_config(ModelSettings(str(tmp_path)))


def test_missing_text_is_told_before_the_model_loads(tmp_path):
    with pytest.raises(UserError, match=r"none\.txt: cannot be read as text"):
        evaluate_language(ModelSettings("no/such/model"), LanguageRequest(text=str(tmp_path / "none.txt")))
    with pytest.raises(UserError, match="device='warp' cannot be used here"):
        choose_device("warp")


# ---------------------------------------------------------------------------------------------- task of a recipe


def test_accuracy_of_a_recipe_has_an_interval(tmp_path):
    model = BertForSequenceClassification(AutoConfig.for_model(**bert_values()))
    randomise(model, seed=6)
    model.save_pretrained(tmp_path / "saved")
    word_tokenizer().save_pretrained(tmp_path / "saved")
    rows = [{"text": words(3 + i % 4, i), "label": ("no", "yes")[i % 2]} for i in range(40)]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--train_file", str(file), "--test_file", str(file), "--max_length", "12", "--use_cpu", "true"]
    scores = evaluate(str(tmp_path / "saved"), load_recipe(None, [*options, "--output_dir", str(tmp_path / "out")]))
    right = []
    for i, row in enumerate(rows):
        with torch.no_grad():
            logits = model.eval()(**word_tokenizer()(row["text"], return_tensors="pt")).logits
        right.append(int(logits.argmax()) == i % 2)
    assert 0 < sum(right) < 40
    assert scores["test_accuracy"] == pytest.approx(np.mean(right))
    assert (scores["test_accuracy_low"], scores["test_accuracy_high"]) == pytest.approx(tuple(mean_interval(right)))


def bert_values() -> dict[str, object]:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    return {"model_type": "bert", "vocab_size": len(TOKENS), "max_position_embeddings": 16, "num_labels": 2, **sizes}
