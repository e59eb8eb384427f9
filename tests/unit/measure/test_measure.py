"""Numbers about a model: counts against hand calculation, timing and memory against invariants."""

from __future__ import annotations

import copy
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tiny import randomise
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

from apt_trainer.errors import UserError
from apt_trainer.evaluate import compare
from apt_trainer.evaluate.compare import benchmark
from apt_trainer.evaluate.peak import PeakRequest, measure_peak
from apt_trainer.measure import (
    Generation,
    Latency,
    PeakMemory,
    compare_generation,
    compare_latency,
    count_flops,
    count_parameters,
    current_memory_bytes,
    example_inputs,
    generate_once,
    peak_memory_bytes,
    ratio_is_noise,
    reset_peak,
    size_on_disk,
    trainable_parameters,
)
from apt_trainer.report.tables import comparison_table
from apt_trainer.settings import ModelSettings

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


@pytest.mark.parametrize("attention", ["sdpa", "flex_attention"])
def test_flops_of_a_decoder_with_grouped_heads(attention):
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
        attn_implementation=attention,
    )
    model = LlamaForSequenceClassification(config)
    per_token = 3 * HIDDEN * HIDDEN + 3 * HIDDEN * NEURONS + HIDDEN * LABELS  # q and o: 2, k and v: 1/2 each
    expected = 2 * BATCH * (LENGTH * per_token + 2 * LENGTH * LENGTH * HIDDEN)
    assert count_flops(model, example_inputs(model, BATCH, LENGTH)) == expected
    assert model.config._attn_implementation == attention


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
    root = Path(__file__).parents[3]
    child = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert ballast.numel() > 0
    assert 60 * 2**20 <= int(child.stdout) < 120 * 2**20


def test_peak_memory_starts_anew():
    block = torch.ones(200 * 2**20, dtype=torch.uint8)
    del block
    assert reset_peak() == (sys.platform == "linux")
    if sys.platform == "linux":
        before = peak_memory_bytes()
        assert before <= 1.05 * current_memory_bytes()
        block = torch.ones(64 * 2**20, dtype=torch.uint8)
        assert peak_memory_bytes() - before >= 0.95 * block.numel()


# ---- generation ----

PROMPT, NEW, WIDTH = 6, 5, 8


def tiny_decoder(layers: int = 2) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=4 * WIDTH,
        intermediate_size=40,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=16,
        pad_token_id=0,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config)
    randomise(model, seed=7)
    return model.eval()


def tiny_seq2seq() -> T5ForConditionalGeneration:
    sizes = {"d_model": 32, "d_kv": WIDTH, "d_ff": 40, "num_layers": 3, "num_heads": 4}
    ids = {"decoder_start_token_id": 3, "pad_token_id": 0, "eos_token_id": None}
    config = T5Config(vocab_size=50, tie_word_embeddings=False, **ids, **sizes)
    model = T5ForConditionalGeneration(config)
    randomise(model, seed=17)
    return model.eval()


@pytest.mark.parametrize("make", [tiny_decoder, tiny_seq2seq])
def test_generated_tokens_are_those_of_generate(make):
    model = make()
    batch = example_inputs(model, 3, PROMPT)
    batch.pop("decoder_input_ids", None)
    tokens = generate_once(model, 3, PROMPT, NEW)
    expected = model.generate(**batch, max_new_tokens=NEW + 1, do_sample=False)
    assert tokens.shape == (3, NEW + 1)
    assert torch.equal(tokens, expected[:, -NEW - 1 :])
    assert len(set(tokens.flatten().tolist())) > 3  # no model that repeats itself


def test_cache_holds_keys_and_values_of_every_layer():
    models = {"short": tiny_decoder(1), "long": tiny_decoder(2)}
    models["long"].train()
    found = compare_generation(models, [1, 3], PROMPT, NEW, min_runs=2, max_seconds=0)
    per_layer = 2 * 2 * WIDTH * (PROMPT + NEW) * 4  # keys and values, two heads, float32
    assert {name: {b: g.cache_bytes for b, g in sizes.items()} for name, sizes in found.items()} == {
        "short": {1: per_layer, 3: 3 * per_layer},
        "long": {1: 2 * per_layer, 3: 6 * per_layer},
    }
    assert found["long"][3].prefill.runs == found["long"][3].decode.runs == 2
    assert models["long"].training and not models["short"].training
    both = compare_generation({"t5": tiny_seq2seq()}, [2], PROMPT, NEW, min_runs=1, max_seconds=0)["t5"][2]
    assert both.cache_bytes == 2 * 3 * (2 * 4 * WIDTH * 4) * (PROMPT + 1 + NEW)  # cross-attention and decoder


def test_tokens_per_second_follow_from_the_times():
    generation = Generation(Latency(20.0, 1.0, 9), Latency(5.0, 0.5, 9), batch_size=4, length=100, cache_bytes=1)
    assert generation.prefill_tokens_per_second == 4 * 100 / 0.020
    assert generation.decode_tokens_per_second == 4 / 0.005


@pytest.mark.parametrize(("new_tokens", "message"), [(11, "make 17 tokens, more than the 16"), (0, "at least 1")])
def test_generation_refuses_what_cannot_run(new_tokens, message):
    with pytest.raises(UserError, match=message):
        generate_once(tiny_decoder(), 1, PROMPT, new_tokens)


# ---- benchmark ----


@pytest.fixture
def no_processes(monkeypatch):
    requests = []
    peaks = {True: {"peak_bytes": 900}, False: {"peak_bytes": 300}}

    def measure(request: PeakRequest) -> dict[str, int]:
        requests.append(request)
        return peaks[request.dense_shape]

    monkeypatch.setattr(compare, "measure_peak", measure)
    monkeypatch.setattr(compare, "MIN_RUNS", 2)
    monkeypatch.setattr(compare, "MAX_SECONDS", 0.0)
    return requests


@pytest.mark.parametrize("make", [tiny_decoder, tiny_seq2seq])
def test_benchmark_of_a_model_that_generates(make, tmp_path, no_processes):
    model = make()
    model.save_pretrained(tmp_path)
    settings = ModelSettings(str(tmp_path), dtype="bfloat16")
    found = benchmark(settings, batch_sizes=[1, 2], length=PROMPT, new_tokens=NEW, device="cpu")
    assert [(r.dense_shape, r.batch_size, r.length, r.new_tokens) for r in no_processes] == [
        (True, 2, PROMPT, NEW),
        (False, 2, PROMPT, NEW),
    ]
    assert no_processes[0].settings["dtype"] == found["dtype"] == "bfloat16"
    parameters = sum(p.numel() for p in model.parameters())
    assert found["total_params"] == found["total_params_dense"] == parameters
    assert found["disk_bytes_dense"] == 4 * parameters and found["disk_bytes"] == size_on_disk(tmp_path)  # as saved
    assert found["disk_dtype"] == found["disk_dtype_dense"] == "float32"
    assert found["memory_bytes"] == 2 * parameters + found["generation"]["pruned"]["2"]["cache_bytes"]
    assert found["flops"] == found["flops_dense"] > 2 * PROMPT * 2 * 50 * 32
    of_two = found["generation"]["pruned"]["2"]
    assert of_two["prefill_tokens_per_second"] == pytest.approx(2 * PROMPT * 1000 / of_two["prefill_ms"]["median_ms"])
    assert of_two["decode_tokens_per_second"] == pytest.approx(2 * 1000 / of_two["decode_ms"]["median_ms"])
    assert of_two["cache_bytes"] == 2 * found["generation"]["dense"]["1"]["cache_bytes"]
    assert "latency_ms" not in found
    table = comparison_table(found, with_flops=True)
    assert "| prefill, batch 2 × 6 " in table and "| cache, batch 1 × 6 + 5 " in table
    assert next(line for line in table.splitlines() if "peak memory in use" in line).endswith("33.3 % |")


def test_benchmark_of_an_encoder_times_forward_passes(tmp_path, no_processes, monkeypatch):
    monkeypatch.setattr(
        compare, "compare_latency", lambda models, *_, **__: {n: {1: Latency(2, 1, 3)} for n in models}
    )
    tiny_model().save_pretrained(tmp_path / "a")
    tiny_model().save_pretrained(tmp_path / "b")
    found = benchmark(str(tmp_path / "a"), str(tmp_path / "b"), batch_sizes=[1], length=LENGTH, device="cpu")
    assert found["latency_ms"]["pruned"] == {"1": {"median_ms": 2, "iqr_ms": 1, "runs": 3}}
    assert found["sequences_per_second"]["pruned"] == {"1": 500.0}
    assert found["block_params"] == LAYERS * (4 * HIDDEN * (HIDDEN + 1) + 2 * HIDDEN * NEURONS + NEURONS + 5 * HIDDEN)
    assert [request.dense_shape for request in no_processes] == [False, False]
    assert found["disk_bytes_dense"] == size_on_disk(tmp_path / "b")
    assert "generation" not in found
    no_processes.clear()
    for given, message in (
        ({"device": "warp"}, "device='warp' cannot be used"),
        ({"baseline": str(tmp_path / "none")}, "none: there is no such folder"),
    ):
        with pytest.raises(UserError, match=message):
            benchmark(str(tmp_path / "a"), **given)
    assert no_processes == []


def test_table_says_what_is_within_noise():
    def speed(prefill: float, decode: float) -> dict[str, object]:
        return {
            "prefill_ms": {"median_ms": 1000 / prefill, "iqr_ms": 100 / prefill},
            "decode_ms": {"median_ms": 1000 / decode, "iqr_ms": 0.0},
            "prefill_tokens_per_second": prefill,
            "decode_tokens_per_second": decode,
            "cache_bytes": 1000,
        }

    found = {
        "generation": {"dense": {"1": speed(100, 10)}, "pruned": {"1": speed(105, 20)}},
        "within_noise": {"1": {"prefill": True, "decode": False}},
        "prompt_length": 8,
        "new_tokens": 4,
    }
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in comparison_table(found).splitlines()[2:]]
    assert rows == [
        ["prefill, batch 1 × 8", "100.0 tokens/s (IQR 10 %)", "105.0 tokens/s (IQR 10 %)", "105.0 % (within noise)"],
        ["decode, batch 1 × 8", "10.0 tokens/s (IQR 0 %)", "20.0 tokens/s (IQR 0 %)", "200.0 %"],
        ["cache, batch 1 × 8 + 4", "1.0 kB", "1.0 kB", "100.0 %"],
    ]


def test_peak_of_a_process_of_its_own(tmp_path):
    vocabulary, rows, length = 30_000, 16, 32
    config = BertConfig(
        vocab_size=vocabulary,
        hidden_size=HIDDEN,
        num_hidden_layers=1,
        num_attention_heads=HEADS,
        intermediate_size=NEURONS,
        max_position_embeddings=length,
    )
    model = BertForMaskedLM(config)
    model.save_pretrained(tmp_path)
    ballast = torch.ones(300 * 2**20, dtype=torch.uint8)  # must not show in the other process
    found = measure_peak(PeakRequest({"model_name_or_path": str(tmp_path)}, False, rows, length, 1, "cpu"))
    weights = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    logits = rows * length * vocabulary * 4
    assert found["weight_bytes"] == weights and ballast.numel() > 0
    assert weights + logits <= found["peak_bytes"] < weights + 3 * logits


def test_failure_of_that_process_is_told_in_its_last_line(monkeypatch):
    failed = subprocess.CompletedProcess([], 1, stdout="", stderr="Traceback\nUserError: no model there\n")
    monkeypatch.setattr("apt_trainer.evaluate.peak.subprocess.run", lambda *_, **__: failed)
    with pytest.raises(UserError, match="memory at batch 16 × 64 failed: UserError: no model there"):
        measure_peak(PeakRequest({"model_name_or_path": "x"}, True, 16, 64, 1, "cpu"))
