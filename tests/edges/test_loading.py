"""A saved result is a model like any other: to Auto classes, other heads, PEFT, TRL, pipelines and the hub."""

from __future__ import annotations

import json
import shutil
import textwrap
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from datasets import Dataset
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from texts import word_tokenizer, words
from tiny import ALL_TASKS, FAMILY_NAMES, LANGUAGE_MODELS, gap, logits, parts, random_plan, tiny_batch, tiny_model
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    T5EncoderModel,
    Trainer,
    TrainingArguments,
    pipeline,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from apt_trainer import UserError, cli, load_pruned
from apt_trainer.models.modeling_apt import model_class
from apt_trainer.settings import ModelSettings
from apt_trainer.store.pretrained import load_dense_shape, load_saved, load_tokenizer
from apt_trainer.store.saved_model import as_pruned
from apt_trainer.surgery.cutting import apply_plan

FORMAT_1 = Path(__file__).parents[1] / "integration" / "v0_1"
EVERY = dict.fromkeys(FAMILY_NAMES, "ForSequenceClassification") | LANGUAGE_MODELS


def cut(family_name: str, task: str, seed: int = 4, **extra: Any) -> PreTrainedModel:
    """A model that lost units of every kind, hidden dimensions too, and one feed-forward."""
    model = tiny_model(family_name, task, **extra)
    family, spaces, dense = parts(model)
    plan = random_plan(spaces, dense, seed=seed, vanish=["layers.0.neurons", "encoder.1.neurons"])
    while len(plan.kept["hidden"]) == len(dense.kept["hidden"]):
        seed += 1
        plan = random_plan(spaces, dense, seed=seed, vanish=["layers.0.neurons", "encoder.1.neurons"])
    apply_plan(model, family, spaces, dense, plan)
    as_pruned(model, family, plan)
    return model


def without_labels(batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value for name, value in batch.items() if name in ("input_ids", "attention_mask")}


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved decoder with a tokenizer."""
    folder = tmp_path_factory.mktemp("decoder")
    save(cut("llama", "ForCausalLM"), folder)
    return folder


def save(model: PreTrainedModel, folder: Path) -> None:
    """With a tokenizer that the model can read."""
    tokenizer = word_tokenizer()
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


# ---------------------------------------------------------------------------- names that other libraries look up


@pytest.mark.parametrize("name", EVERY)
def test_a_cut_model_has_the_names_of_the_stock_one(name: str, tmp_path: Path) -> None:
    stock = tiny_model(name, EVERY[name])
    small = cut(name, EVERY[name])
    small.save_pretrained(tmp_path)
    for model in (small, load_pruned(tmp_path), ALL_TASKS[EVERY[name]].from_pretrained(tmp_path)):
        assert type(model) is not type(stock)
        assert (type(model).__name__, model._get_name()) == (type(stock).__name__, stock._get_name())
        assert (model.config.model_type, model.loss_type) == (stock.config.model_type, stock.loss_type)
        assert model.can_generate() == stock.can_generate()
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["model_type"] == f"apt_{stock.config.model_type}"
    assert written["architectures"] == [f"Apt{type(stock).__name__}"]


@pytest.mark.parametrize("loaded", [False, True])
def test_label_smoothing_shifts_the_labels_of_a_cut_causal_model(loaded: bool, tmp_path: Path) -> None:
    model = cut("llama", "ForCausalLM")
    if loaded:
        model.save_pretrained(tmp_path / "model")
        model = load_pruned(tmp_path / "model")
    batch = tiny_batch(model.eval(), padded=False)
    args = TrainingArguments(str(tmp_path), label_smoothing_factor=0.1, report_to=[], use_cpu=True)
    smoothed = Trainer(model, args).compute_loss(model, dict(batch))
    log = torch.log_softmax(model(input_ids=batch["input_ids"]).logits[:, :-1].float(), -1)
    nll = -log.gather(-1, batch["labels"][:, 1:, None]).mean()
    assert gap(smoothed, 0.9 * nll + 0.1 * -log.mean()) <= 1e-6
    assert model._get_name() in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()


@pytest.mark.parametrize("name", EVERY)
def test_peft_finds_the_modules_that_it_finds_in_the_stock_model(name: str) -> None:
    small = cut(name, EVERY[name])
    try:
        expected = get_peft_model(tiny_model(name, EVERY[name]), LoraConfig()).peft_config["default"].target_modules
    except ValueError as error:  # PEFT has no default for some families
        with pytest.raises(ValueError, match=str(error)):
            get_peft_model(small, LoraConfig())
    else:
        assert get_peft_model(small, LoraConfig()).peft_config["default"].target_modules == expected


def test_an_adapter_on_a_result_is_saved_and_found_again(decoder: Path, tmp_path: Path) -> None:
    model = get_peft_model(load_pruned(decoder), LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False)).eval()
    model.save_pretrained(tmp_path)
    batch = without_labels(tiny_batch(model))
    expected = logits(model, batch)
    assert gap(expected, logits(load_pruned(decoder).eval(), batch)) > 0.01
    again = AutoPeftModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(again, batch), expected)
    through = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(through, batch), expected)


def test_trl_trains_a_folder_by_its_name(decoder: Path, tmp_path: Path) -> None:
    from trl import SFTConfig, SFTTrainer

    rows = Dataset.from_dict({"text": [words(6), words(9)] * 4})
    args = SFTConfig(str(tmp_path), max_steps=1, report_to=[], use_cpu=True, max_length=16, bf16=False)
    trainer = SFTTrainer(str(decoder), args, train_dataset=rows, peft_config=LoraConfig())
    trainer.train()
    small = load_pruned(decoder)
    assert trainer.model.get_base_model().num_parameters() > small.num_parameters()  # with its adapters
    assert trainer.model.get_base_model().model.layers[1].mlp.down_proj.in_features == (
        small.model.layers[1].mlp.down_proj.in_features
    )


def test_pipelines_take_a_folder(decoder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made = pipeline("text-generation", model=str(decoder), device="cpu")
    text = made(words(3), max_new_tokens=3, do_sample=False)[0]["generated_text"]
    tokenizer, model = AutoTokenizer.from_pretrained(decoder), load_pruned(decoder).eval()
    ids = tokenizer(words(3), return_tensors="pt")
    expected = tokenizer.decode(model.generate(**ids, max_new_tokens=3, do_sample=False)[0], skip_special_tokens=True)
    assert text.replace(" ", "") == expected.replace(" ", "")
    save(cut("bert", "ForSequenceClassification"), tmp_path)
    for name in ("text-classification", "feature-extraction"):
        assert pipeline(name, model=str(tmp_path), device="cpu")(words(4))
    assert "is not supported" not in caplog.text


def test_the_tokenizer_is_that_of_the_stock_model_type(tmp_path: Path) -> None:
    """Where no file names its class, it follows from the model type."""
    model, tokenizer = tiny_model("distilbert"), word_tokenizer()
    for folder, saved in (("stock", model), ("small", cut("distilbert", "ForSequenceClassification"))):
        saved.save_pretrained(tmp_path / folder)
        tokenizer.save_pretrained(tmp_path / folder)
        (tmp_path / folder / "tokenizer_config.json").unlink()
    kinds = {type(AutoTokenizer.from_pretrained(tmp_path / folder)) for folder in ("stock", "small")}
    assert len(kinds) == 1


def test_a_model_and_its_config_can_be_pickled(decoder: Path) -> None:
    import pickle

    model = load_pruned(decoder).eval()
    again, config = pickle.loads(pickle.dumps((model, model.config)))
    batch = without_labels(tiny_batch(model))
    assert torch.equal(logits(again, batch), logits(model, batch)) and config == model.config


# ---------------------------------------------------------------------------- the base model, and other heads


@pytest.mark.parametrize("name", EVERY)
def test_the_base_model_loads_from_the_folder_and_saves_by_itself(name: str, tmp_path: Path) -> None:
    small = cut(name, EVERY[name]).eval()
    small.save_pretrained(tmp_path / "whole")
    small.base_model.save_pretrained(tmp_path / "base")
    batch = without_labels(tiny_batch(small))
    if small.config.is_encoder_decoder:
        batch["decoder_input_ids"] = batch["input_ids"]
        expected = small(**batch, output_hidden_states=True).decoder_hidden_states[-1]
    else:
        expected = small.base_model(**batch).last_hidden_state
    loaders = [(AutoModel, "whole")]
    if type(small.base_model) is not type(small):  # T5 with its head is its own base
        loaders.append((AutoModel, "base"))
    for auto, folder in loaders:
        again, info = auto.from_pretrained(tmp_path / folder, output_loading_info=True)
        assert set(info["missing_keys"]) <= {"pooler.dense.weight", "pooler.dense.bias"}
        assert not info["mismatched_keys"]
        assert torch.equal(again.eval()(**batch).last_hidden_state, expected)
    again = load_pruned(tmp_path / "base").eval()
    assert type(again).__name__ == type(small.base_model).__name__
    names = {name for name, _ in again.named_parameters() if not name.startswith("pooler")}
    assert names == {name for name, _ in small.base_model.named_parameters() if not name.startswith("pooler")}


def test_the_encoder_of_a_cut_t5(tmp_path: Path) -> None:
    small = cut("t5", "ForConditionalGeneration").eval()
    small.save_pretrained(tmp_path)
    batch = without_labels(tiny_batch(small))
    expected = small.encoder(**batch).last_hidden_state
    encoder = transformers.AutoModelForTextEncoding.from_pretrained(tmp_path).eval()
    assert isinstance(encoder, T5EncoderModel)
    assert torch.equal(encoder(**batch).last_hidden_state, expected)
    encoder.save_pretrained(tmp_path / "encoder")
    assert torch.equal(load_pruned(tmp_path / "encoder").eval()(**batch).last_hidden_state, expected)


OTHER_HEADS = [
    ("bert", "ForSequenceClassification", "ForTokenClassification"),
    ("bert", "ForTokenClassification", "ForSequenceClassification"),
    ("bert", "ForMaskedLM", "ForQuestionAnswering"),
    ("roberta", "ForMaskedLM", "ForSequenceClassification"),
    ("distilbert", "ForSequenceClassification", "ForMaskedLM"),
    ("modernbert", "ForMaskedLM", "ForSequenceClassification"),
    ("llama", "ForCausalLM", "ForSequenceClassification"),
    ("gpt2", "ForCausalLM", "ForTokenClassification"),
    ("opt", "ForCausalLM", "ForQuestionAnswering"),
    ("t5", "ForConditionalGeneration", "ForSequenceClassification"),
    ("t5", "ForConditionalGeneration", "ForTokenClassification"),
]


@pytest.mark.parametrize(("name", "saved", "asked"), OTHER_HEADS)
def test_another_head_is_new_and_of_the_cut_width(name: str, saved: str, asked: str, tmp_path: Path) -> None:
    small = cut(name, saved).eval()
    small.save_pretrained(tmp_path / "saved")
    labels = 2 if asked == "ForQuestionAnswering" else 3
    other = ALL_TASKS[asked].from_pretrained(tmp_path / "saved", num_labels=labels).train()
    batch = tiny_batch(other)
    other(**batch).loss.backward()
    assert all(p.grad is not None for n, p in other.named_parameters() if "pooler" not in n and "decoder" not in n)
    other.eval().save_pretrained(tmp_path / "again")
    again = load_pruned(tmp_path / "again").eval()
    assert type(again) is type(other)
    assert torch.equal(logits(again, batch), logits(other, batch))
    assert other.get_input_embeddings().weight.shape[1] == small.get_input_embeddings().weight.shape[1] < 16
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    sizes = config["apt_structure"]["parameters"]
    of_both = other.config.apt_structure["parameters"]
    sizes[next(n for n, shape in of_both.items() if len(shape) == 1 and "mbed" not in n)] = [1]
    (tmp_path / "saved" / "config.json").write_text(json.dumps(config))
    with pytest.raises(RuntimeError, match="has other sizes than its config says"):
        ALL_TASKS[asked].from_pretrained(tmp_path / "saved", num_labels=labels)


def test_a_head_that_is_not_described_is_refused_in_one_sentence(tmp_path: Path) -> None:
    cut("bert", "ForSequenceClassification").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="BertForMultipleChoice has a head that is not described"):
        transformers.AutoModelForMultipleChoice.from_pretrained(tmp_path)


# ---------------------------------------------------------------------------- vocabulary and labels


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5", "gemma2"])
def test_added_tokens_survive_a_save(name: str, tmp_path: Path) -> None:
    small = cut(name, "ForMaskedLM" if name == "bert" else LANGUAGE_MODELS[name]).eval()
    small.resize_token_embeddings(47)
    small.save_pretrained(tmp_path / "one")
    again = load_pruned(tmp_path / "one").eval()
    batch = tiny_batch(small)
    batch["input_ids"] = batch["input_ids"] + 7
    assert again.get_input_embeddings().weight.shape[0] == 47
    assert torch.equal(logits(again, batch), logits(small, batch))
    again.resize_token_embeddings(33)
    again.save_pretrained(tmp_path / "two")
    assert load_pruned(tmp_path / "two").get_output_embeddings().weight.shape[0] == 33


@pytest.mark.parametrize("name", ["bert", "distilbert", "llama"])
@pytest.mark.parametrize("task", ["ForSequenceClassification", "ForTokenClassification"])
def test_another_number_of_labels(name: str, task: str, tmp_path: Path) -> None:
    small = cut(name, task)
    small.save_pretrained(tmp_path / "three")
    with pytest.raises(UserError, match="mismatched keys"):
        load_pruned(tmp_path / "three", num_labels=5)
    five = load_pruned(tmp_path / "three", num_labels=5, ignore_mismatched_sizes=True).eval()
    batch = without_labels(tiny_batch(five))
    assert logits(five, batch).shape[-1] == 5
    five.save_pretrained(tmp_path / "five")
    assert torch.equal(logits(load_pruned(tmp_path / "five").eval(), batch), logits(five, batch))


# ---------------------------------------------------------------------------- what from_pretrained accepts


def on_the_hub(folder: Path, cache: Path, name: str, revision: str = "main", commit: str = "a" * 40) -> None:
    """Put ``folder`` into a local cache, as a download from the hub would."""
    place = cache / ("models--" + name.replace("/", "--"))
    shutil.copytree(folder, place / "snapshots" / commit)
    (place / "refs").mkdir(parents=True, exist_ok=True)
    (place / "refs" / revision).write_text(commit)


@pytest.fixture
def hub(decoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache that holds someone/small: on main a stock model, at v2 the cut one, there also in a sub-folder."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    cache, source = tmp_path / "cache", tmp_path / "source"
    tiny_model("llama", "ForCausalLM").save_pretrained(tmp_path / "stock")
    shutil.copytree(decoder, source)
    shutil.copytree(decoder, source / "inner")
    on_the_hub(tmp_path / "stock", cache, "someone/small")
    on_the_hub(source, cache, "someone/small", "v2", "b" * 40)
    return cache


def test_a_hub_name_with_revision_cache_and_subfolder(hub: Path, decoder: Path) -> None:
    expected = load_pruned(decoder).eval()
    batch = without_labels(tiny_batch(expected))
    for extra in ({}, {"subfolder": "inner"}, {"token": "hf_none", "dtype": torch.float32}):
        found = load_pruned("someone/small", cache_dir=hub, revision="v2", **extra).eval()
        assert torch.equal(logits(found, batch), logits(expected, batch))
        auto = AutoModelForCausalLM.from_pretrained("someone/small", cache_dir=hub, revision="v2", **extra)
        assert torch.equal(logits(auto.eval(), batch), logits(expected, batch))
    with pytest.raises(UserError, match="someone/small is a stock model"):
        load_pruned("someone/small", cache_dir=hub)
    with pytest.raises(UserError, match="someone/other could not be loaded"):
        load_pruned("someone/other", cache_dir=hub)
    with pytest.raises(UserError, match="could not be loaded"):
        load_pruned("someone/small", cache_dir=hub, revision="v3")


def test_values_of_the_config_and_options_of_loading(decoder: Path) -> None:
    model = load_pruned(decoder, output_hidden_states=True, dtype=torch.bfloat16, attn_implementation="eager")
    batch = without_labels(tiny_batch(model))
    assert len(model.eval()(**batch).hidden_states) == 4
    assert (model.dtype, model.config._attn_implementation) == (torch.bfloat16, "eager")
    assert load_pruned(decoder, output_attentions=True, attn_implementation="eager")(**batch).attentions is not None
    assert load_pruned(decoder, dtype="auto").dtype == torch.float32
    config = AutoConfig.from_pretrained(decoder, use_cache=False)
    assert load_pruned(decoder, config=config)(**batch).past_key_values is None
    model, info = load_pruned(decoder, output_loading_info=True)
    assert isinstance(model, PreTrainedModel) and not info["missing_keys"]
    assert load_pruned(decoder, device_map="cpu").device.type == "cpu"
    assert load_pruned(decoder, low_cpu_mem_usage=True, use_safetensors=True, trust_remote_code=True).num_parameters()


def test_evaluate_takes_a_hub_name_with_its_revision(
    hub: Path, decoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.txt").write_text(words(40))
    common = ["--perplexity", str(tmp_path / "text.txt"), "--window", "8", "--device", "cpu", "--output", "-"]
    place = ["--model_revision", "v2", "--model_init_kwargs", f"{{cache_dir: {hub}, subfolder: inner}}"]
    found = []
    for words_of_model in ([str(decoder)], ["someone/small", *place]):
        assert cli.main(["evaluate", *words_of_model, *common]) == 0
        found.append(json.loads(capsys.readouterr().out))
    assert found[0]["perplexity"]["value"] == found[1]["perplexity"]["value"]
    assert found[0]["parameters"] == found[1]["parameters"]


def test_benchmark_takes_settings_of_the_model(
    hub: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In this process; that memory is measured in others is tested with ``evaluate.peak``."""
    monkeypatch.setattr("apt_trainer.evaluate.compare.measure_memory", lambda *given: {})
    further = f"{{cache_dir: {hub}, output_hidden_states: true}}"
    sizes = ["--batch_sizes", "1", "--length", "6", "--new_tokens", "2", "--device", "cpu", "--output", "-"]
    model = ["someone/small", "--model_revision", "v2", "--model_init_kwargs", further]
    assert cli.main(["benchmark", *model, *sizes]) == 0
    found = json.loads(capsys.readouterr().out)
    small = load_pruned("someone/small", cache_dir=hub, revision="v2")
    assert found["total_params"] == small.num_parameters() < found["total_params_dense"]
    assert cli.main(["benchmark", "someone/small", "--task", "regression", *sizes]) == 2
    assert "task says nothing about the model" in capsys.readouterr().err


def test_settings_of_one_model_are_not_those_of_another(hub: Path, decoder: Path) -> None:
    """A revision, a sub-folder or values of the config belong to the model they were given for."""
    kwargs = {"cache_dir": str(hub), "subfolder": "inner", "output_hidden_states": True}
    settings = ModelSettings("someone/small", model_revision="v2", model_init_kwargs=kwargs, dtype="bfloat16")
    assert load_saved(settings).config.output_hidden_states is True
    assert load_dense_shape(settings).config.output_hidden_states is True
    other = load_saved(settings.of(str(decoder)))
    assert other.config.output_hidden_states is False and other.dtype == torch.bfloat16
    tokenizer = load_tokenizer(replace(settings, tokenizer_name_or_path=str(decoder)))
    assert len(tokenizer) == len(word_tokenizer())


WRONG_KWARGS = [
    ({"token": "hf_secret"}, "HF_TOKEN"),
    ({"dtype": "float16"}, "dtype is not for there"),
    ({"device_map": "auto"}, "--device"),
    ({"no_such_argument": 3}, "no_such_argument"),
]


@pytest.mark.parametrize(("kwargs", "said"), WRONG_KWARGS)
def test_arguments_that_cannot_be_are_refused(kwargs: dict[str, Any], said: str, decoder: Path) -> None:
    with pytest.raises(UserError, match=said) as error:
        load_saved(ModelSettings(str(decoder), model_init_kwargs=kwargs))
    assert "hf_secret" not in str(error.value)


def test_a_stock_model_with_code_of_its_own_keeps_its_head(tmp_path: Path) -> None:
    """Its class is none of transformers; ``auto_map`` says which Auto class builds it."""
    code = """
        from transformers import BertConfig, BertForSequenceClassification
        class OwnConfig(BertConfig):
            model_type = "own"
        class OwnModel(BertForSequenceClassification):
            config_class = OwnConfig
    """
    tiny_model("bert").save_pretrained(tmp_path)
    (tmp_path / "own.py").write_text(textwrap.dedent(code))
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"model_type": "own", "architectures": ["OwnModel"]}
    config["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoModelForSequenceClassification": "own.OwnModel"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = load_saved(ModelSettings(str(tmp_path), trust_remote_code=True))
    assert torch.equal(model.classifier.weight, tiny_model("bert").classifier.weight)


# ---------------------------------------------------------------------------- older folders


@pytest.mark.parametrize("name", ["bert_keep_norm", "gpt2_gone", "t5_hidden"])
def test_a_folder_of_version_0_1_0_takes_other_vocabularies_labels_and_heads(name: str, tmp_path: Path) -> None:
    """That its logits are what they were: ``integration/test_reference.py``."""
    old = load_pruned(FORMAT_1 / name).eval()
    batch = without_labels(tiny_batch(old))
    if old.config.is_encoder_decoder:
        batch["decoder_input_ids"] = batch["input_ids"]
    expected = logits(old, batch)
    old.resize_token_embeddings(45)
    old.save_pretrained(tmp_path / "new")
    new = load_pruned(tmp_path / "new").eval()
    assert new.config.vocab_size == 45
    assert gap(logits(new, batch)[..., : expected.shape[-1]], expected) <= 1e-6
    other = "ForTokenClassification" if name != "gpt2_gone" else "ForSequenceClassification"
    again = ALL_TASKS[other].from_pretrained(FORMAT_1 / name, num_labels=5).eval()
    batch.pop("decoder_input_ids", None)
    assert logits(again, batch).shape[-1] == 5


# ---------------------------------------------------------------------------- what a file claims


WRONG = [
    ("parameters", "model.layers.1.mlp.up_proj.weight", [None, -3], "whole number"),
    ("parameters", "model.layers.1.mlp.up_proj.weight", [10**12, 10**12], "whole number"),
    ("parameters", "model.layers.1.mlp.up_proj.weight", [True, None], "whole number"),
    ("parameters", "model.layers.1.mlp.up_proj.weight", "huge", "does not fit"),
    ("parameters", "model.layers.1.mlp.up_proj.weight", [4], "does not fit"),
    ("parameters", "model.layers.1.mlp.none.weight", [4], "no such module"),
    ("parameters", "model.layers.1.mlp.up_proj.__class__", [4], "does not fit"),
    ("attributes", "model.layers.1.mlp.up_proj", {"out_features": 10**9}, "no size"),
    ("attributes", "model.layers.1.mlp.up_proj", {"out_features": 2.5}, "no size"),
    ("attributes", "model.layers.1.mlp.up_proj", {"forward": 3}, "no size"),
    ("replaced", "model.layers.1.mlp", "os.system", "does not know"),
    ("replaced", "../../elsewhere", "zero_feed_forward", "no such module"),
    ("replaced", "model.layers.1.mlp", ["zero_feed_forward"], "no known form"),
    ("attributes", "model.layers.1.mlp", 3, "no known form"),
    ("hidden", "size", -1, "whole number"),
    ("hidden", "size", 10**12, "whole number"),
    ("hidden", "heads", ["ForCausalLM"], "no known form"),
    ("hidden", "reads", None, "no known form"),
]


@pytest.mark.parametrize(("part", "path", "value", "said"), WRONG)
def test_sizes_that_cannot_be_are_refused(
    part: str, path: str, value: Any, said: str, decoder: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(decoder, tmp_path / "copy"))
    config = json.loads((folder / "config.json").read_text())
    config["apt_structure"][part][path] = value
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=said) as error:
        load_pruned(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("structure", [[], {}, "none", {"replaced": [], "parameters": {}, "attributes": {}}])
def test_a_structure_of_no_known_form_is_refused(structure: Any, decoder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(decoder, tmp_path / "copy"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"apt_structure": structure}))
    with pytest.raises(UserError, match="no known form"):
        load_pruned(folder)
    (folder / "config.json").write_text(json.dumps(config | {"apt_base_architecture": "BertForMaskedLM"}))
    with pytest.raises(UserError, match="says it is a BertForMaskedLM, with a AptLlamaConfig"):
        load_pruned(folder)
    for name in ("PreTrainedModel", "os", "NoSuchModel", 3):
        (folder / "config.json").write_text(json.dumps(config | {"apt_base_architecture": name}))
        with pytest.raises(UserError, match="no model class"):
            load_pruned(folder)


def test_heads_that_the_bias_of_a_t5_does_not_have_are_refused(tmp_path: Path) -> None:
    cut("t5", "ForConditionalGeneration").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    attributes = config["apt_structure"]["attributes"]
    path = next(path for path, sizes in attributes.items() if "kept_heads" in sizes)
    for wrong in ([0, 4], [-1, 2], [2, 1], [1, 1], [], 3, [0.5], [True]):
        attributes[path]["kept_heads"] = wrong
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(UserError, match="kept_heads"):
            load_pruned(tmp_path)


def test_classes_are_found_by_the_name_of_the_stock_one() -> None:
    from apt_trainer.models import modeling_apt

    assert modeling_apt.BertForSequenceClassification is model_class("BertForSequenceClassification")
    assert modeling_apt.AptBertForSequenceClassification is model_class("BertForSequenceClassification")
    for name in ("NoSuchModel", "__path__", "torch_is_not_here"):
        assert not hasattr(modeling_apt, name)
