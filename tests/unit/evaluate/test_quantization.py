"""Weight-only quantisation: values within a step of the grid, what is left alone, on pruned models, from the shell."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import bitsandbytes
import pytest
import torch
from texts import tiny_llama, word_tokenizer, words
from tiny import LANGUAGE_MODELS, tiny_model

from apt_trainer import cli
from apt_trainer.errors import UserError
from apt_trainer.evaluate.quantization import GROUP_SIZE, quantize
from apt_trainer.scoring.sublayers.drop import drop
from apt_trainer.scoring.sublayers.units import Unit, find_units


def wide(neurons: int = 96) -> torch.nn.Module:
    return tiny_llama(
        hidden_size=64, intermediate_size=neurons, num_attention_heads=4, num_key_value_heads=2, head_dim=16
    )


@pytest.mark.parametrize(("form", "levels"), [("int8", 127), ("int4", 7), ("llm_int8", 127)])
def test_weights_move_by_less_than_a_step(form: str, levels: int) -> None:
    dense, model = wide(), wide()
    found = quantize(model, form)
    assert found.layers == 7 * len(model.model.layers) and found.left == 0
    assert found.weight_bytes < found.weight_bytes_before
    for name, module in dense.named_modules():
        if not isinstance(module, torch.nn.Linear):
            continue
        weight, other = module.weight, model.get_submodule(name).weight
        if name == "lm_head":
            assert torch.equal(weight, other)
            continue
        grouped = weight.view(len(weight), -1, GROUP_SIZE if form == "int4" else weight.shape[1])
        step = grouped.abs().amax(-1, keepdim=True) / levels
        if form == "llm_int8":
            other = other.SCB[:, None] / 127 * other.CB.float()
            step = step * (1 + 127 / 1024)  # rounded to float16 first: 2^-11 of up to 127 steps
        change = (other.dequantize().view_as(grouped) - grouped).abs()
        assert (change <= step * 0.51 + 1e-7).all() and change.max() > 0
    assert torch.equal(dense.model.embed_tokens.weight, model.model.embed_tokens.weight)


def test_nf4_is_the_nearest_quantile_of_a_normal_distribution_in_half_a_byte() -> None:
    dense, model = wide(128), wide(128)
    found = quantize(model, "nf4")
    assert found.layers == 7 * len(model.model.layers) and found.left == 0
    saved = 0
    for name, module in dense.model.layers.named_modules():
        if isinstance(module, torch.nn.Linear):
            stored = model.model.layers.get_submodule(name).weight
            back = bitsandbytes.functional.dequantize_4bit(stored, stored.quant_state)
            grouped = module.weight.view(-1, stored.quant_state.blocksize)
            scaled = grouped / grouped.abs().amax(-1, keepdim=True)
            nearest = (scaled[..., None] - stored.quant_state.code).abs().min(-1).values
            change = (back.view_as(grouped) - grouped).abs() / grouped.abs().amax(-1, keepdim=True)
            assert (change - nearest).abs().max() < 0.01  # the scales are quantised too
            saved += module.weight.nbytes - stored.numel()
            assert stored.numel() * 2 == module.weight.numel()
    assert found.weight_bytes_before - found.weight_bytes == pytest.approx(saved, rel=0.1)


def test_layers_that_do_not_divide_into_groups_stay() -> None:
    model = tiny_llama(hidden_size=64, intermediate_size=40, num_attention_heads=4, num_key_value_heads=2, head_dim=16)
    found = quantize(model, "int4")
    assert found.left == len(model.model.layers) and type(model.model.layers[0].mlp.down_proj.weight) is (
        torch.nn.Parameter
    )
    model = wide()  # kernels for the CPU cannot read rows of a block and a half
    assert quantize(model, "nf4").left == len(model.model.layers)
    assert type(model.model.layers[0].mlp.down_proj) is torch.nn.Linear


@pytest.mark.parametrize(("form", "bound"), [("int8", 0.05), ("llm_int8", 0.05), ("nf4", 0.3)])
def test_a_model_without_some_layers_still_runs(form: str, bound: float) -> None:
    model = wide()
    drop(model, find_units(model), [Unit("attention", 0), Unit("mlp", 1)])
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        before = model.eval()(ids).logits
        quantize(model, form)
        after = model(ids).logits
    assert 0 < (after - before).norm() < bound * before.norm()


def test_what_cannot_be_quantised_is_told() -> None:
    with pytest.raises(UserError, match="int8, int4, llm_int8, nf4"):
        quantize(wide(), "int2")
    with pytest.raises(UserError, match="no linear layer in its blocks that can become int8"):
        quantize(tiny_model("gpt2", LANGUAGE_MODELS["gpt2"]), "int8")


@pytest.mark.parametrize(("form", "module"), [("int4", "torchao.quantization"), ("nf4", "bitsandbytes.nn")])
def test_a_missing_library_is_named(form: str, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=rf"needs {module.partition('.')[0]}: pip install 'apt-trainer\[quantize\]'"):
        quantize(wide(), form)


def test_evaluate_quantised(tmp_path: Path, capsys) -> None:
    wide().save_pretrained(tmp_path / "model")
    word_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text(words(100))
    command = ["evaluate", str(tmp_path / "model"), "--perplexity", str(tmp_path / "text.txt"), "--window", "16"]
    values = {}
    for form in (None, "int8", "int4", "llm_int8", "nf4"):
        out = tmp_path / f"{form}.json"
        more = ["--quantize", form] if form else []
        assert cli.main([*command, "--device", "cpu", "--output", str(out), *more]) == 0
        found = json.loads(out.read_text())
        values[form] = found["perplexity"]["value"]
        assert found.get("quantised", {}).get("form") == form
    moved = {form: abs(value / values[None] - 1) for form, value in values.items()}
    assert 0 < moved["int8"] < moved["int4"] < 0.2 and 0 < moved["llm_int8"] < moved["nf4"] < 0.2
    capsys.readouterr()
    assert cli.main(["evaluate", str(tmp_path / "model"), "--quantize", "int8"]) == 2
    assert "goes with perplexity" in capsys.readouterr().err
