"""Unevenly cut models in other runtimes: the same numbers there, in a process without apt_trainer; or one sentence."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import subprocess
from pathlib import Path

import pytest
import torch
from texts import byte_tokenizer
from tiny import parts, random_plan, tiny_batch, tiny_model
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from apt_trainer import UserError
from apt_trainer.cli import main
from apt_trainer.errors import RunError
from apt_trainer.store.export import RECORD, export, parse_format
from apt_trainer.store.export import gguf as gguf_target
from apt_trainer.store.export.onnx_session import OnnxModel
from apt_trainer.store.saved_model import as_pruned
from apt_trainer.surgery.cutting import apply_plan

ENCODERS = [
    ("distilbert", "ForQuestionAnswering"),
    ("modernbert", "ForMaskedLM"),
]
DECODERS = ["llama", "gemma3_text", "gpt2"]


def cut(family: str, task: str, vanish: tuple[str, ...] = (), **extra: object) -> PreTrainedModel:
    """A tiny model of uneven widths, saved class and all."""
    model = tiny_model(family, task, **extra)
    table, spaces, dense = parts(model)
    plan = random_plan(spaces, dense, 5, kinds=("heads", "neurons"), vanish=vanish)
    apply_plan(model, table, spaces, dense, plan)
    as_pruned(model, table, plan)
    return model.eval()


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


@pytest.mark.parametrize(("family", "task"), ENCODERS)
def test_encoders_in_onnx(family: str, task: str, tmp_path: Path) -> None:
    model = cut(family, task, vanish=("layers.1.heads", "layers.2.neurons"))
    record = export(model, "onnx", tmp_path / "onnx")
    assert record["loaded_by"] == "onnxruntime" and record["equal"]
    assert record["largest_difference"] < 1e-4 * record["largest_output"]
    assert json.loads((tmp_path / "onnx" / RECORD).read_text()) == record
    config = json.loads((tmp_path / "onnx" / "config.json").read_text())
    assert config["model_type"] == model.config.apt_base_model_type and "apt_structure" not in config
    assert not list((tmp_path / "onnx").rglob("*.safetensors")), "a stock config beside cut weights would load wrongly"


@pytest.mark.parametrize("family", DECODERS)
def test_decoders_in_onnx_generate_with_their_cache(family: str, tmp_path: Path) -> None:
    model = cut(family, "ForCausalLM", vanish=("layers.0.heads", "layers.1.neurons"), max_position_embeddings=40)
    record = export(model, "onnx", tmp_path / "onnx")
    assert record["equal"] and record["greedy_tokens_equal"]
    run = OnnxModel(tmp_path / "onnx" / "onnx" / "model.onnx")
    heads = [run.inputs[name].shape[1] for name in run.inputs if name.endswith(".key")]
    assert len(heads) == 2, "the layer without attention has no slot"
    described = json.loads((tmp_path / "onnx" / "genai_config.json").read_text())["model"]["decoder"]
    assert described["num_hidden_layers"] == 2 and described["num_key_value_heads"] == heads[0]
    prompt, decode = run.seconds({"input_ids": torch.ones(2, 5, dtype=torch.long).numpy()}, 3)
    assert prompt > 0 and decode > 0


def classifier() -> PreTrainedModel:
    return cut("bert", "ForSequenceClassification", vanish=("layers.1.heads", "layers.2.neurons"))


@pytest.fixture(scope="module")
def from_command_line(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """(folder with the saved ``classifier`` in ``model`` and its export in ``onnx``, what was printed)."""
    folder, printed = tmp_path_factory.mktemp("classifier"), io.StringIO()
    classifier().save_pretrained(folder / "model")
    (folder / "model" / "1_Pooling").mkdir()
    for file in ("modules.json", "1_Pooling/config.json"):  # as sentence-transformers has them
        (folder / "model" / file).write_text("[]")
    command = ["export", str(folder / "model"), "--format", "onnx", "--output", str(folder / "onnx")]
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr("apt_trainer.store.export.speed.MAX_SECONDS", 0.0)
        assert main([*command, "--speed", "--batch_sizes", "1", "2", "--length", "8"]) == 0
    return folder, printed.getvalue()


def test_a_classifier_from_the_command_line(
    from_command_line: tuple[Path, str], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, printed = from_command_line
    record = json.loads((folder / "onnx" / RECORD).read_text())
    assert record["equal"] and record["largest_difference"] < 1e-4 * record["largest_output"]
    assert "loaded by onnxruntime in a process without apt_trainer" in printed
    assert (folder / "onnx" / "modules.json").is_file() and (folder / "onnx" / "1_Pooling" / "config.json").is_file()
    assert f"{record['speed']['speedup']['export']['2']['forward']:.2f} ×" in printed
    assert main(["export", str(folder / "model"), "--format", "onnx", "--output", str(folder / "onnx")]) == 2
    assert "not empty" in capsys.readouterr().err


def test_int8_keeps_predictions(from_command_line: tuple[Path, str], tmp_path: Path) -> None:
    model, plain = classifier(), json.loads((from_command_line[0] / "onnx" / RECORD).read_text())
    small = export(model, "onnx", tmp_path / "small", quantize="int8")
    assert small["file"].endswith("model_quantized.onnx") and not (tmp_path / "small/onnx/model.onnx").exists()
    assert small["bytes"] != plain["bytes"] and small["same_prediction"] >= 0.6
    batch = tiny_batch(model)
    answer = OnnxModel(tmp_path / "small/onnx/model_quantized.onnx")({k: v.numpy() for k, v in batch.items()})
    with torch.no_grad():
        expected = model(**batch).logits
    assert float((torch.from_numpy(answer["logits"]) - expected).abs().max()) < 0.2 * float(expected.abs().max())


def sized(tokenizer: PreTrainedTokenizerFast) -> dict[str, object]:
    """Config of a language model for ``tokenizer``."""
    sizes = {"hidden_size": 32, "head_dim": 16, "max_position_embeddings": 64, "vocab_size": len(tokenizer)}
    rest = {"eos_token_id": 0, "bos_token_id": None, "use_sliding_window": False, "attention_bias": False}
    return {"tie_word_embeddings": True, **sizes, **rest}


@pytest.mark.parametrize(
    ("family", "vanish", "architecture"),
    [
        ("llama", ("layers.0.heads", "layers.1.neurons", "layers.2.heads", "layers.2.neurons"), "deci"),
        ("qwen2", ("layers.1.heads", "layers.1.neurons"), "deci"),
        ("qwen3", ("layers.1.neurons", "layers.0.heads"), "openelm"),
    ],
)
def test_decoders_in_llama_cpp(
    family: str,
    vanish: tuple[str, ...],
    architecture: str,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    model = cut(family, "ForCausalLM", vanish, **sized(tokenizer))
    assert gguf_target.architecture_of(model) == architecture
    record = export(model, "gguf", tmp_path / "gguf", tokenizer=tokenizer)
    assert record["loaded_by"] == "llama.cpp" and record["equal"]
    assert record["greedy_tokens_equal"] and record["same_tokenization"]
    small = export(model, "gguf", tmp_path / "small", quantize="q8_0", tokenizer=tokenizer)
    assert small["bytes"] < 0.6 * record["bytes"]


@pytest.mark.node
def test_transformers_js_classifies(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """``NODE_PATH`` names the folder in which transformers.js is installed."""
    model = cut("bert", "ForSequenceClassification", ("layers.1.heads",), vocab_size=len(tokenizer), pad_token_id=1)
    tokenizer.model_max_length = 32
    export(model, "onnx", tmp_path / "small", tokenizer=tokenizer)
    script = """
        const { pipeline, env } = require("@huggingface/transformers");
        [env.allowRemoteModels, env.localModelPath] = [false, process.argv[1]];
        const options = { dtype: "fp32", device: "cpu" };
        pipeline("text-classification", "small", options)
            .then(classify => classify(process.argv[2], { top_k: 9 }))
            .then(found => console.log(JSON.stringify(found)));
    """
    text = "the cat sat on the matter"
    done = subprocess.run(["node", "-e", script, f"{tmp_path}/", text], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = {each["label"]: each["score"] for each in json.loads(done.stdout.splitlines()[-1])}
    with torch.no_grad():
        expected = model(**tokenizer(text, return_tensors="pt")).logits[0].softmax(-1)
    names = model.config.id2label
    assert found == pytest.approx({names[i]: float(score) for i, score in enumerate(expected)}, abs=1e-5)


@pytest.mark.parametrize(
    ("family", "task", "form", "said"),
    [
        ("gemma2", "ForCausalLM", "gguf", "no layer in llama.cpp"),
        ("bert", "ForSequenceClassification", "gguf", "no layer in llama.cpp"),
        ("mistral", "ForCausalLM", "gguf", "attends to a window"),
        ("qwen3", "ForCausalLM", "gguf", "a head of its own"),
        ("t5", "ForConditionalGeneration", "openvino", "Use --format onnx"),
        ("t5", "ForSequenceClassification", "onnx", "does not generate"),
    ],
)
def test_what_a_format_cannot_hold_is_refused(family: str, task: str, form: str, said: str, tmp_path: Path) -> None:
    extra = {"tie_word_embeddings": False} if family == "qwen3" else {}
    with pytest.raises(UserError, match=said):
        export(cut(family, task, **extra), form, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_what_computes_something_else_is_not_kept(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file with a wrong weight loads as well as a right one."""
    original = gguf_target.write

    def write(model: PreTrainedModel, *rest: object) -> None:
        other = copy.deepcopy(model)
        with torch.no_grad():
            other.model.norm.weight.mul_(1.1)
        original(other, *rest)

    monkeypatch.setattr(gguf_target, "write", write)
    model = cut("llama", "ForCausalLM", **sized(tokenizer))
    with pytest.raises(RunError, match="does not compute"):
        export(model, "gguf", tmp_path / "out", tokenizer=tokenizer)
    assert not list(tmp_path.iterdir())


def test_tokens_per_second_of_llama_cpp(
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("apt_trainer.store.export.speed.MAX_SECONDS", 0.0)
    cut("llama", "ForCausalLM", **sized(tokenizer)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    command = ["export", str(tmp_path / "model"), "--format", "gguf", "--quantize", "q8_0"]
    command += ["--output", str(tmp_path / "gguf"), "--speed", "--length", "16", "--new_tokens", "6"]
    assert main([*command, "--batch_sizes", "1", "2"]) == 0
    speed = json.loads((tmp_path / "gguf" / RECORD).read_text())["speed"]
    assert set(speed["milliseconds"]["export"]) == {"1"} and set(speed["milliseconds"]["pruned"]) == {"1", "2"}
    rates = speed["tokens_per_second"]["1"]
    decode = speed["milliseconds"]["export"]["1"]["decode"]["median_ms"]
    assert rates["decode"] == pytest.approx(1000 / decode)
    assert f"decode, batch 1: {rates['decode']:,.1f} tokens/s" in capsys.readouterr().out


def test_names_of_formats() -> None:
    assert parse_format("onnx_int8") == ("onnx", "int8") and parse_format("gguf_q4_k_m") == ("gguf", "q4_k_m")
    with pytest.raises(UserError, match="onnx, openvino, gguf"):
        parse_format("tflite")
    with pytest.raises(UserError, match="int8"):
        parse_format("onnx_q8_0")
