"""Formats beside ONNX and GGUF: what a folder of them says, who loads it, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from integration.factories import SHORT, Rows, make_trainer
from integration.test_pruned_before import BEFORE
from safetensors.torch import load_file
from texts import word_tokenizer
from tiny import gap, parts, random_plan, tiny_model
from transformers import AutoConfig, AutoModelForMaskedLM, AutoTokenizer, PreTrainedModel

from apt_trainer import APTConfig, UserError, load_pruned
from apt_trainer.cli import main
from apt_trainer.runs.exports import check_exports
from apt_trainer.store.export import export
from apt_trainer.store.saved_model import as_pruned
from apt_trainer.surgery.cutting import apply_plan

IDS = torch.arange(4, 16).reshape(2, 6)


def cut(family: str, task: str, vanish: tuple[str, ...] = (), **extra: Any) -> PreTrainedModel:
    """A tiny model of uneven widths, saved class and all."""
    model = tiny_model(family, task, **extra)
    table, spaces, dense = parts(model)
    plan = random_plan(spaces, dense, 5, kinds=("heads", "neurons"), vanish=vanish)
    apply_plan(model, table, spaces, dense, plan)
    as_pruned(model, table, plan)
    return model.eval()


# ---------------------------------------------------------------------------- adapter


@pytest.fixture(scope="module", params=["bert", "refit", "llama", "gpt2"])
def kept(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """(folder with the dense model in ``base`` and that of a run that kept its adapters in ``run``, its name).

    The base of an encoder has another head than the task needs; "refit" solves weights anew before it trains.
    """
    folder, name = tmp_path_factory.mktemp(request.param), request.param
    changes: dict[str, Any] = {**SHORT, "keep_adapters": True}
    if name in ("refit", "gpt2"):
        changes = {**BEFORE, "keep_adapters": True, "refit": name == "refit"}
    decoder = name in ("llama", "gpt2")
    task = "ForCausalLM" if decoder else "ForSequenceClassification"
    family = "bert" if name == "refit" else name
    tiny_model(family, task if decoder else "ForMaskedLM").save_pretrained(folder / "base")
    model = type(tiny_model(family, task)).from_pretrained(folder / "base", num_labels=3)
    trainer = make_trainer(folder / "run", model, Rows(40, "text" if decoder else "classification"), **changes)
    trainer.train()
    trainer.save_model()
    return folder, name


def test_an_adapter_gives_the_whole_model_again(kept: tuple[Path, str], tmp_path: Path) -> None:
    folder, name = kept
    small = tmp_path / "small"
    assert main(["export", str(folder / "run"), "--format", "adapter", "--output", str(small)]) == 0
    whole, again = load_pruned(folder / "run").eval(), load_pruned(small).eval()
    assert type(again).__name__ == type(whole).__name__ and again.config.id2label == whole.config.id2label
    assert again.config.apt_structure == whole.config.apt_structure
    with torch.no_grad():
        assert gap(again(IDS).logits, whole(IDS).logits) <= 1e-6
    tensors = load_file(small / "apt_difference.safetensors")
    in_full = [key for key in tensors if key.startswith("weight/")]
    assert any(key.startswith("adapter/") for key in tensors)
    if name != "refit":
        assert all("classifier" in key or "pooler" in key for key in in_full), in_full
    if name == "bert":
        _bases_that_are_another(folder, small, whole)


def _bases_that_are_another(folder: Path, small: Path, whole: PreTrainedModel) -> None:
    shutil.move(folder / "base", folder / "moved")
    with pytest.raises(UserError, match=r"needs its base .*base, which could not be loaded .*base=PATH") as error:
        load_pruned(small)
    assert "\n" not in str(error.value)
    moved = load_pruned(small, base=folder / "moved", dtype="float64").eval()
    with torch.no_grad():
        assert moved.dtype == torch.float64 and gap(moved(IDS).logits, whole(IDS).logits) <= 1e-4
    other = AutoModelForMaskedLM.from_pretrained(folder / "moved")
    with torch.no_grad():
        other.bert.encoder.layer[0].output.dense.weight[0, 0] += 1
    other.save_pretrained(folder / "other")
    with pytest.raises(UserError, match="other is not the model that .* was made from"):
        load_pruned(small, base=folder / "other")
    with pytest.raises(UserError, match="pruned before"):
        load_pruned(small, base=folder / "run")


def test_what_is_no_adapter_is_refused(tmp_path: Path) -> None:
    cut("bert", "ForSequenceClassification").save_pretrained(tmp_path / "whole")
    with pytest.raises(UserError, match="Train with keep_adapters: true"):
        export(str(tmp_path / "whole"), "adapter", tmp_path / "small")
    assert not (tmp_path / "small").exists()
    with pytest.raises(UserError, match="keep_adapters: true keeps what is added to frozen weights"):
        APTConfig(output_dir=str(tmp_path), keep_adapters=True, tune_after_distillation="full")
    with pytest.raises(UserError, match="Set keep_adapters: true"):
        check_exports(APTConfig(output_dir=str(tmp_path), export=["adapter"]), tiny_model("bert"), None)


def test_what_a_run_cannot_end_with_is_told_before(tmp_path: Path) -> None:
    model = tiny_model("llama", "ForCausalLM", attention_bias=False)
    values: dict[str, Any] = {"output_dir": str(tmp_path), "target_sparsity": 0.3}
    with pytest.raises(UserError, match=r"Set prune_targets: \[heads, neurons\]"):
        check_exports(APTConfig(export=["per_layer_config"], **values), model, None)
    with pytest.raises(UserError, match="Leave remote_code: false out"):
        check_exports(APTConfig(export=["decilm"], remote_code=False, **values), model, None)
    narrow = {"prune_targets": ["heads", "neurons"]}
    check_exports(APTConfig(export=["per_layer_config", "decilm", "hf"], **narrow, **values), model, None)
    with pytest.raises(UserError, match="Leave --style out"):
        check_exports(APTConfig(export=["decilm"], shape="uniform", **narrow, **values), model, None)


# ---------------------------------------------------------------------------- ONNX of two stacks

BART = {
    f"{stack}_{name}": size
    for stack in ("encoder", "decoder")
    for name, size in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 24))
}


@pytest.mark.parametrize(("family", "quantize"), [("t5", None), ("bart", "int8")])
def test_an_encoder_and_a_decoder_in_onnx(family: str, quantize: str | None, tmp_path: Path) -> None:
    """Attentions are gone in the decoder, and a consumer that knows the config alone generates by the files."""
    extra = {"num_decoder_layers": 2} if family == "t5" else BART | {"d_model": 16, "decoder_start_token_id": 2}
    gone = ("decoder.1.heads", "decoder.0.cross_heads", "encoder.1.heads")
    model = cut(family, "ForConditionalGeneration", gone, layers=2, **extra)
    record = export(model, "onnx", tmp_path / "onnx", quantize=quantize)
    assert record["loaded_by"] == "onnxruntime" and record["same_prediction"] > 0.8
    if quantize is None:
        assert record["equal"] and record["greedy_tokens_equal"]
        assert record["largest_difference"] < 1e-5 * record["largest_output"]
    suffix = "" if quantize is None else "_quantized"
    names = {f"encoder_model{suffix}.onnx", f"decoder_model_merged{suffix}.onnx"}
    assert {file.name for file in (tmp_path / "onnx" / "onnx").iterdir()} == names

    prompt, config = torch.arange(5, 12)[None], AutoConfig.from_pretrained(tmp_path / "onnx")
    encode, decode = (onnxruntime.InferenceSession(tmp_path / "onnx" / "onnx" / name) for name in sorted(names)[::-1])
    mask = np.ones((1, 7), np.int64)
    [states] = encode.run(None, {"input_ids": prompt.numpy(), "attention_mask": mask})
    slots = [value.name for value in decode.get_inputs() if value.name.startswith("past_key_values.")]
    assert len(slots) == 4 * 2, "as many layers as the config says"
    heads = config.num_attention_heads
    past = {name: np.zeros((1, heads, 0, config.d_model // heads), np.float32) for name in slots}
    ids, found = np.array([[config.decoder_start_token_id]]), []
    for step in range(6):
        given = {"input_ids": ids, "encoder_attention_mask": mask, "encoder_hidden_states": states, **past}
        given["use_cache_branch"] = np.array([step > 0])
        answer = dict(zip([value.name for value in decode.get_outputs()], decode.run(None, given), strict=True))
        for name in slots:
            if step == 0 or ".decoder." in name:  # what the encoder's states gave is kept, as optimum does
                past[name] = answer[name.replace("past_key_values.", "present.")]
        ids = answer["logits"][:, -1:].argmax(-1)
        found.append(int(ids[0, 0]))
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "forced_eos_token_id": None}
    expected = model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)[0, 1:].tolist()
    assert found == expected or quantize is not None
    assert not list((tmp_path / "onnx").rglob("*.safetensors"))


# ---------------------------------------------------------------------------- OpenVINO


@pytest.mark.parametrize(
    ("family", "task", "vanish"),
    [("bert", "ForSequenceClassification", ("layers.1.heads",)), ("llama", "ForCausalLM", ("layers.0.heads",))],
)
def test_openvino(family: str, task: str, vanish: tuple[str, ...], tmp_path: Path) -> None:
    model = cut(family, task, vanish)
    plain = export(model, "openvino", tmp_path / "plain")
    assert plain["loaded_by"] == "OpenVINO" and plain["equal"] and plain.get("greedy_tokens_equal", True)
    assert plain["largest_difference"] < 1e-4 * plain["largest_output"]
    assert plain["bytes"] > 4 * sum(weight.numel() for weight in model.parameters())
    if "greedy_tokens_equal" in plain:  # tracing a decoder takes a while
        return
    small = export(model, "openvino", tmp_path / "small", quantize="int8")
    assert small["same_prediction"] >= 0.6 and small["largest_difference"] < 0.2 * plain["largest_output"]
    sizes = [(tmp_path / name / "openvino_model.bin").stat().st_size for name in ("small", "plain")]
    assert sizes[0] < 0.6 * sizes[1]


# ---------------------------------------------------------------------------- hf


GONE = ("layers.0.heads", "layers.1.neurons", "layers.2.heads", "layers.2.neurons")


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3"])
def test_per_layer_config(family: str, tmp_path: Path) -> None:
    model = cut(family, "ForCausalLM", GONE)
    record = export(model, "per_layer_config", tmp_path / "hf")
    assert record["loaded_by"] == "transformers" and record["equal"] and record["greedy_tokens_equal"]
    described = json.loads((tmp_path / "hf" / "config.json").read_text())
    sizes = described["per_layer_config"]
    assert sizes["0"]["num_key_value_heads"] == 1 and sizes["0"]["num_attention_heads"] == 2, "a head of zeros"
    assert sizes["1"]["intermediate_size"] == 8, "neurons of zeros"
    layers = load_pruned(tmp_path / "hf").model.layers
    if family == "llama":
        for i, layer in enumerate(layers):
            assert layer.self_attn.k_proj.out_features == 6 * sizes[str(i)]["num_key_value_heads"]
            assert layer.mlp.up_proj.out_features == sizes[str(i)]["intermediate_size"]
    config = AutoConfig.from_pretrained(tmp_path / "hf")
    assert [config.per_layer_config[i].num_key_value_heads for i in range(3)] == [
        sizes[str(i)]["num_key_value_heads"] for i in range(3)
    ]


def test_decilm(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cut("llama", "ForCausalLM", GONE[:2], attention_bias=False).save_pretrained(tmp_path / "whole")
    command = ["export", str(tmp_path / "whole"), "--format", "hf", "--style", "decilm", "--output"]
    assert main([*command, str(tmp_path / "hf")]) == 0
    assert "loaded by transformers in a process without apt_trainer" in capsys.readouterr().out
    described = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert described["model_type"] == "nemotron-nas" and described["architectures"] == ["DeciLMForCausalLM"]
    blocks = described["block_configs"]
    assert not blocks[0]["attention"]["no_op"], "layer 0 must have its attention"
    assert blocks[1]["ffn"] == {"no_op": True, "intermediate_size": None}
    assert all(described["num_attention_heads"] % block["attention"]["n_heads_in_group"] == 0 for block in blocks)


@pytest.mark.parametrize(
    ("family", "task", "form", "said"),
    [
        ("t5", "ForConditionalGeneration", "per_layer_config", "counts heads and neurons by other names"),
        ("qwen3", "ForCausalLM", "decilm", "not those of LLaMA. Export it with --style per_layer_config"),
        ("qwen2", "ForCausalLM", "decilm", "attentions have biases"),
        ("mistral", "ForCausalLM", "decilm", "attends to a window"),
    ],
)
def test_what_vllm_cannot_hold_is_refused(family: str, task: str, form: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said):
        export(cut(family, task), form, tmp_path / "out")
    with pytest.raises(UserError, match="Leave --style out"):
        export(tiny_model("llama", "ForCausalLM", attention_bias=False), form, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("family", "told", "longest"), [("bert", None, 20), ("roberta", None, 18), ("bert", 7, 7)])
def test_the_tokenizer_tells_the_longest_input(family: str, told: int | None, longest: int, tmp_path: Path) -> None:
    """FastEmbed and others ask it. RoBERTa counts positions from its padding token on, which is 1."""
    model, tokenizer = cut(family, "ForSequenceClassification"), word_tokenizer()
    model.config.apt_remote_code = False  # so that no process is started to check it
    if told is not None:
        tokenizer.model_max_length = told
    export(model, "hf", tmp_path / "hf", tokenizer=tokenizer)
    described = json.loads((tmp_path / "hf" / "tokenizer_config.json").read_text())
    assert described["model_max_length"] == longest
    assert described["tokenizer_class"] == "PreTrainedTokenizerFast", "which transformers 4 knows too"
    assert AutoTokenizer.from_pretrained(tmp_path / "hf")("w1 w2").input_ids == tokenizer("w1 w2").input_ids


def test_a_folder_without_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = cut("t5", "ForConditionalGeneration")
    record = export(model, "hf", tmp_path / "with")
    assert record["loaded_by"] == "transformers" and record["equal"]
    model.save_pretrained(tmp_path / "plain", remote_code=False)
    assert main(["export", str(tmp_path / "plain"), "--format", "hf", "--output", str(tmp_path / "without")]) == 0
    assert "was not checked" in capsys.readouterr().out
    assert not list((tmp_path / "without").glob("*.py")) and (tmp_path / "with" / "modeling_apt.py").is_file()
    assert main(["export", str(tmp_path / "plain"), "--format", "onnx", "--style", "decilm", "--output", "x"]) == 2
