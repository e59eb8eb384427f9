"""Numbers about a model: counts against hand calculation, timing and memory against invariants."""

from __future__ import annotations

import copy
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForSequenceClassification

from apt_trainer.errors import UserError
from apt_trainer.measure import (
    Latency,
    PeakMemory,
    compare_latency,
    count_flops,
    count_parameters,
    current_memory_bytes,
    example_inputs,
    peak_memory_bytes,
    ratio_is_noise,
    size_on_disk,
    trainable_parameters,
)

HIDDEN, NEURONS, HEADS, LAYERS, LABELS = 32, 64, 4, 2, 3
BATCH, LENGTH = 3, 8


def tiny_model(attention: str = "sdpa") -> BertForSequenceClassification:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50,
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=NEURONS,
        max_position_embeddings=16,
        num_labels=LABELS,
        attn_implementation=attention,
    )
    return BertForSequenceClassification(config)


def block_flops(inner: int, neurons: int) -> int:
    """One block on BATCH × LENGTH tokens: four projections, two attention products, two feed-forward products."""
    per_token = 4 * HIDDEN * inner + 2 * HIDDEN * neurons
    attention = 2 * LENGTH * LENGTH * inner
    return 2 * BATCH * (LENGTH * per_token + attention)


HEAD_FLOPS = 2 * BATCH * (HIDDEN * HIDDEN + HIDDEN * LABELS)


def narrow(model: BertForSequenceClassification, heads: int, neurons: int) -> None:
    """Cut the first layer by hand to its first heads and neurons."""
    layer = model.bert.encoder.layer[0]
    inner = heads * HIDDEN // HEADS
    attention = layer.attention.self
    for linear in (attention.query, attention.key, attention.value):
        linear.weight = nn.Parameter(linear.weight[:inner].detach().clone())
        linear.bias = nn.Parameter(linear.bias[:inner].detach().clone())
    layer.attention.output.dense.weight = nn.Parameter(layer.attention.output.dense.weight[:, :inner].detach().clone())
    attention.num_attention_heads, attention.all_head_size = heads, inner
    layer.intermediate.dense.weight = nn.Parameter(layer.intermediate.dense.weight[:neurons].detach().clone())
    layer.intermediate.dense.bias = nn.Parameter(layer.intermediate.dense.bias[:neurons].detach().clone())
    layer.output.dense.weight = nn.Parameter(layer.output.dense.weight[:, :neurons].detach().clone())


class TiedModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 4)
        self.out = nn.Linear(4, 10)
        self.out.weight = self.embedding.weight


def test_parameters_count_tied_tensors_once():
    model = TiedModel()
    assert count_parameters(model) == 10 * 4 + 10
    model.embedding.weight.requires_grad = False
    assert trainable_parameters(model) == 10


def test_parameters_use_the_whole_size_under_zero3():
    linear = nn.Linear(3, 5)
    linear.weight.data = torch.empty(0)
    linear.weight.ds_numel = 15
    assert count_parameters(linear) == trainable_parameters(linear) == 20


def test_size_on_disk_adds_weight_files_only(tmp_path):
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(b"x" * 100)
    (tmp_path / "model-00002-of-00002.safetensors").write_bytes(b"x" * 23)
    (tmp_path / "optimizer.pt").write_bytes(b"x" * 1000)
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "checkpoint-1" / "model.safetensors").write_bytes(b"x" * 7)
    assert size_on_disk(tmp_path) == 123
    with pytest.raises(UserError, match="not a folder"):
        size_on_disk(tmp_path / "absent")


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_flops_equal_the_analytic_count(attention):
    model = tiny_model(attention)
    expected = LAYERS * block_flops(HIDDEN, NEURONS) + HEAD_FLOPS
    assert count_flops(model, example_inputs(model, BATCH, LENGTH)) == expected


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_flops_follow_a_cut(attention):
    model = tiny_model(attention)
    narrow(model, heads=1, neurons=24)
    expected = block_flops(HIDDEN // HEADS, 24) + block_flops(HIDDEN, NEURONS) + HEAD_FLOPS
    batch = example_inputs(model, BATCH, LENGTH)
    assert count_flops(model, batch) == expected
    model(**batch)  # the model cut by hand really runs


def test_flops_of_a_decoder_with_grouped_heads():
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=HIDDEN,
        intermediate_size=NEURONS,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=16,
        pad_token_id=0,
        num_labels=LABELS,
    )
    model = LlamaForSequenceClassification(config)
    per_token = 3 * HIDDEN * HIDDEN + 3 * HIDDEN * NEURONS + HIDDEN * LABELS  # q and o: 2, k and v: 1/2 each
    expected = 2 * BATCH * (LENGTH * per_token + 2 * LENGTH * LENGTH * HIDDEN)
    assert count_flops(model, example_inputs(model, BATCH, LENGTH)) == expected


def test_flops_of_a_model_without_storage():
    with torch.device("meta"):
        model = tiny_model()
    inputs = {"input_ids": torch.ones(BATCH, LENGTH, dtype=torch.long, device="meta")}
    assert count_flops(model, inputs) == LAYERS * block_flops(HIDDEN, NEURONS) + HEAD_FLOPS


def test_flops_leave_the_model_alone():
    model = tiny_model().train()
    calls = []
    model.bert.encoder.layer[0].register_forward_hook(lambda *_: calls.append(1))
    before = {name: (id(p), p.device) for name, p in model.named_parameters()}
    values = copy.deepcopy(model.state_dict())
    count_flops(model, example_inputs(model, BATCH, LENGTH))
    assert calls == [] and model.training
    assert {name: (id(p), p.device) for name, p in model.named_parameters()} == before
    assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())
    model(**example_inputs(model, BATCH, LENGTH))
    assert calls == [1]


def test_example_inputs_stay_inside_the_vocabulary():
    model = tiny_model()
    batch = example_inputs(model, 5, 16)
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (5, 16)
    assert batch["input_ids"].min() >= 0 and batch["input_ids"].max() < 50
    assert not (batch["input_ids"] == model.config.pad_token_id).any()
    assert bool(batch["attention_mask"].all())
    assert torch.equal(batch["input_ids"], example_inputs(model, 5, 16)["input_ids"])


@pytest.mark.parametrize(("batch_size", "length", "message"), [(1, 17, "at most 16"), (0, 4, "at least 1")])
def test_example_inputs_refuse_what_cannot_run(batch_size, length, message):
    with pytest.raises(UserError, match=message):
        example_inputs(tiny_model(), batch_size, length)


class Sleeper(nn.Module):
    """Takes a known time and writes down its name."""

    def __init__(self, name: str, seconds: float, calls: list[str]) -> None:
        super().__init__()
        self.config = BertConfig(vocab_size=50, max_position_embeddings=16)
        self.weight = nn.Parameter(torch.zeros(1))
        self.inner = nn.Dropout()
        self.name, self.seconds, self.calls = name, seconds, calls

    def forward(self, input_ids, attention_mask):
        assert not self.training and not self.inner.training and torch.is_inference_mode_enabled()
        self.calls.append(self.name)
        time.sleep(self.seconds)


def test_latency_takes_turns_and_measures_milliseconds():
    calls: list[str] = []
    models = {"slow": Sleeper("slow", 0.02, calls), "fast": Sleeper("fast", 0.002, calls)}
    models["fast"].inner.eval()
    result = compare_latency(models, [1, 2], 4, min_runs=5, max_seconds=0)
    assert calls == ["slow", "fast"] * (2 * (2 + 5))  # two batch sizes, each with 2 warm-up and 5 timed rounds
    assert set(result) == {"slow", "fast"} and set(result["slow"]) == {1, 2}
    assert result["slow"][1].runs == 5
    assert 20 <= result["slow"][1].median_ms < 60
    assert 2 <= result["fast"][2].median_ms < 20
    assert models["slow"].training and models["slow"].inner.training
    assert models["fast"].training and not models["fast"].inner.training


def test_latency_stops_when_time_is_over():
    calls: list[str] = []
    start = time.perf_counter()
    compare_latency({"only": Sleeper("only", 0.001, calls)}, [1], 4, min_runs=3, max_seconds=0.2)
    assert len(calls) >= 5
    assert time.perf_counter() - start < 2


def test_latency_of_a_real_model():
    result = compare_latency({"dense": tiny_model()}, [2], 8, min_runs=3, max_seconds=0.1)
    assert result["dense"][2].median_ms > 0 and result["dense"][2].iqr_ms >= 0


def test_ratio_is_noise_where_intervals_overlap():
    assert ratio_is_noise(Latency(10, 2, 9), Latency(11.5, 2, 9))
    assert ratio_is_noise(Latency(11.5, 2, 9), Latency(10, 2, 9))
    assert not ratio_is_noise(Latency(10, 1, 9), Latency(11.5, 1, 9))


def test_peak_memory_sees_what_was_freed():
    peak = PeakMemory()
    size = 300 * 2**20
    block = torch.ones(size, dtype=torch.uint8)
    assert current_memory_bytes() >= size
    del block
    # An earlier peak of this process may be higher, never lower.
    assert peak.above_start() >= 0.95 * size
    assert peak_memory_bytes() >= peak.start_bytes + 0.95 * size


def test_peak_memory_does_not_inherit_the_peak_of_the_parent():
    ballast = torch.ones(400 * 2**20, dtype=torch.uint8)  # the child starts while this process is large
    code = (
        "from apt_trainer.measure.memory import PeakMemory\n"
        "peak = PeakMemory()\n"
        "data = bytearray(64 * 2**20)\n"
        "print(peak.above_start())"
    )
    root = Path(__file__).parents[2]
    child = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert ballast.numel() > 0
    assert 60 * 2**20 <= int(child.stdout) < 120 * 2**20
