from __future__ import annotations

import copy
import math
import weakref
from collections import Counter
from types import MethodType

import numpy as np
import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from scipy.special import rel_entr, softmax
from torch import nn
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    PreTrainedModel,
)
from transformers.modeling_outputs import (
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)

from apt_trainer.distillation import (
    HiddenTransform,
    Teacher,
    hidden_distance,
    layer_loss,
    layer_outputs,
    match_layers,
    prediction_loss,
    sample_teacher_layers,
    snapshot,
)
from apt_trainer.errors import UserError
from apt_trainer.models import family_of
from apt_trainer.plan.pruning_plan import PruningPlan
from apt_trainer.surgery.cutting import apply_plan

HIDDEN = 16
LAYERS = 3


def tiny(cls: type[PreTrainedModel] = BertForSequenceClassification, dropout: float = 0.1) -> PreTrainedModel:
    """Adapters (with a B that is not zero) and the head train; the rest is frozen."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50,
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        intermediate_size=24,
        max_position_embeddings=32,
        num_labels=2 if cls is BertForQuestionAnswering else 3,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    model = inject_adapter_in_model(LoraConfig(r=4, target_modules=["query", "value"]), cls(config))
    head = ("classifier", "qa_outputs")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name or name.startswith(head))
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return model.train()


def batch(padding: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 50, (4, 7), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, 5:] = 0
    return {
        "input_ids": nn.functional.pad(ids, (0, padding)),
        "attention_mask": nn.functional.pad(mask, (0, padding)),
        "labels": torch.tensor([0, 1, 2, 0]),
    }


def unlabelled() -> dict[str, torch.Tensor]:
    return {name: value for name, value in batch().items() if name != "labels"}


def random_hidden(num_layers: int, shape: tuple[int, ...], seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for _ in range(num_layers)]


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    """In eval mode, with the mode of every module put back."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    result = model(**unlabelled()).logits
    for module, mode in modes.items():
        module.training = mode
    return result


# --- teacher ---------------------------------------------------------------------------------------------------------


def test_snapshot_shares_what_is_frozen_and_copies_what_trains() -> None:
    student = tiny()
    teacher = dict(snapshot(student).named_parameters())
    trains = {name for name, p in student.named_parameters() if p.requires_grad}
    assert any("lora_A" in name for name in trains) and "classifier.weight" in trains
    for name, parameter in student.named_parameters():
        assert (teacher[name].data_ptr() == parameter.data_ptr()) == (name not in trains), name
        assert not teacher[name].requires_grad
        assert parameter.requires_grad == (name in trains)


def test_snapshot_shares_integer_buffers_but_not_running_statistics() -> None:
    student = nn.Sequential(nn.BatchNorm1d(2))
    student.register_buffer("positions", torch.arange(3))
    student.requires_grad_(False)
    teacher = snapshot(student)
    before = teacher(torch.ones(4, 2))
    student(torch.randn(4, 2))
    assert torch.equal(teacher(torch.ones(4, 2)), before)
    assert teacher.positions.data_ptr() == student.positions.data_ptr()


def test_snapshot_keeps_tied_weights_tied() -> None:
    student = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    student["b"].weight = student["a"].weight
    teacher = snapshot(student)
    assert teacher["a"].weight is teacher["b"].weight
    assert teacher["a"].weight is not student["a"].weight


def test_snapshot_has_no_gradients() -> None:
    student = tiny()
    student(**batch()).loss.backward()
    assert student.classifier.weight.grad is not None
    assert all(p.grad is None for p in snapshot(student).parameters())
    assert student.classifier.weight.grad is not None


def test_logits_are_equal_right_after_a_snapshot() -> None:
    student = tiny()
    teacher = Teacher(HIDDEN)
    assert teacher.offer(student, 0.5)
    assert torch.equal(teacher.forward(batch()).logits, logits(student))


def test_student_keeps_training_and_the_teacher_stays_bit_equal() -> None:
    student = tiny()
    teacher = Teacher(HIDDEN)
    teacher.offer(student, 0.5)
    before, student_before = teacher.forward(batch()).logits, logits(student)
    optimizer = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        student(**batch()).loss.backward()
        optimizer.step()
    assert torch.equal(teacher.forward(batch()).logits, before)
    assert not torch.allclose(logits(student), student_before)


def test_student_is_cut_and_the_teacher_stays_bit_equal() -> None:
    student = tiny(dropout=0.0)
    teacher, transform = Teacher(HIDDEN), HiddenTransform(HIDDEN, HIDDEN)
    teacher.offer(student, 0.5)
    before = teacher.forward(batch()).logits
    family = family_of(student.config)
    spaces = family.spaces(student)
    dense = PruningPlan.dense(spaces)
    keep = {"hidden": torch.tensor([0, 3, 4, 9, 15]), "layers.1.heads": torch.tensor([1, 2])}
    keep |= {"layers.0.neurons": torch.arange(8), "layers.2.neurons": torch.tensor([], dtype=torch.long)}
    survivors = apply_plan(student, family, spaces, dense, dense.narrowed(keep))
    student.config.num_labels = 77
    teacher.follow(survivors["hidden"])
    transform.cut_inputs(survivors["hidden"])

    assert torch.equal(teacher.forward(batch()).logits, before)
    assert teacher.hidden_index is not None and teacher.hidden_index.tolist() == [0, 3, 4, 9, 15]
    assert teacher.model is not None and teacher.model.config.num_labels == 3
    ours = layer_outputs(student(**unlabelled(), output_hidden_states=True))
    theirs = layer_outputs(teacher.forward(batch(), output_hidden_states=True))
    assert ours[0].shape[-1] == 5 and theirs[0].shape[-1] == HIDDEN
    pairs = match_layers((0, 1, 2), [True, True, False], ours, theirs, transform)
    assert pairs == [(0, 0), (1, 1), (1, 2)]
    layer_loss(ours, theirs, pairs, transform, batch()["attention_mask"]).backward()
    assert transform.lora_B.grad.isfinite().all() and transform.lora_B.grad.abs().sum() > 0

    old = weakref.ref(teacher.model)
    assert teacher.offer(student, 0.4) and old() is None  # and the old weights with it
    transform.retarget()
    assert teacher.num_hidden == transform.num_teacher == 5
    assert torch.equal(teacher.forward(batch()).logits, logits(student))


def test_dropout_of_the_student_stays_on() -> None:
    student = tiny(dropout=0.5)
    teacher = Teacher(HIDDEN)
    teacher.offer(student, 0.5)
    teacher.forward(batch())
    assert all(module.training for module in student.modules())
    assert teacher.model is not None and not any(module.training for module in teacher.model.modules())
    assert not torch.equal(student(**batch()).logits, student(**batch()).logits)
    assert torch.equal(teacher.forward(batch()).logits, teacher.forward(batch()).logits)


def test_hooks_stay_with_the_student() -> None:
    class Owner:
        """Stands for a mask store: must not be copied, and hears only the student."""

        def __init__(self) -> None:
            self.calls = 0

        def forward_hook(self, module: nn.Module, args: object, output: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return output * 0

        def forward_pre_hook(self, module: nn.Module, args: object, kwargs: object) -> None:
            self.calls += 1

        def backward_hook(self, module: nn.Module, grad_in: object, grad_out: object) -> None:
            self.calls += 1

        def __deepcopy__(self, memo: object) -> Owner:
            raise AssertionError("the owner of a hook was copied")

    student, owner = tiny(), Owner()
    plain = logits(student)
    layer = student.bert.encoder.layer[0].output.dense
    layer.register_forward_hook(owner.forward_hook, always_call=True)
    layer.register_forward_pre_hook(owner.forward_pre_hook, with_kwargs=True)
    layer.register_full_backward_hook(owner.backward_hook)
    teacher = Teacher(HIDDEN)
    teacher.offer(student, 0.5)
    assert torch.equal(teacher.forward(batch()).logits, plain)
    assert owner.calls == 0
    assert not torch.equal(logits(student), plain)
    assert owner.calls == 2


def test_hidden_states_are_returned_even_if_the_student_returned_some_before() -> None:
    student = tiny(dropout=0.0)
    inputs = batch()
    expected = layer_outputs(student(**inputs, output_hidden_states=True))
    teacher = Teacher(HIDDEN)
    teacher.offer(student, 0.5)
    got = layer_outputs(teacher.forward(inputs, output_hidden_states=True))
    assert len(got) == len(expected) == LAYERS
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)
    assert len(layer_outputs(student(**inputs, output_hidden_states=True))) == LAYERS
    assert not teacher.forward(inputs).get("hidden_states")


def test_a_wrapped_forward_is_bound_to_the_copy() -> None:
    """Mixed precision in training replaces ``forward`` on the instance by a bound method."""
    student = tiny()
    original = student.forward
    student.forward = MethodType(torch.autocast("cpu", dtype=torch.bfloat16)(original.__func__), student)
    teacher = Teacher(HIDDEN)
    teacher.offer(student, 0.5)
    before = teacher.forward(batch()).logits
    assert before.dtype == torch.bfloat16
    with torch.no_grad():
        student.classifier.weight.zero_()
    assert torch.equal(teacher.forward(batch()).logits, before)


@pytest.mark.parametrize(
    ("cls", "labels"),
    [
        (BertForSequenceClassification, {"labels": torch.zeros(4, dtype=torch.long)}),
        (BertForTokenClassification, {"labels": torch.zeros(4, 7, dtype=torch.long)}),
        (
            BertForQuestionAnswering,
            {"start_positions": torch.zeros(4, dtype=torch.long), "end_positions": torch.ones(4, dtype=torch.long)},
        ),
    ],
)
def test_forward_leaves_labels_out(cls: type[PreTrainedModel], labels: dict[str, torch.Tensor]) -> None:
    teacher = Teacher(HIDDEN)
    teacher.offer(tiny(cls), 0.5)
    output = teacher.forward(unlabelled() | labels)
    assert output.get("loss") is None
    assert not any(value.requires_grad for value in output.values())


def test_only_a_better_loss_gives_a_snapshot() -> None:
    student, teacher = tiny(), Teacher(HIDDEN)
    assert teacher.model is None and teacher.best_loss == math.inf
    assert not teacher.offer(student, math.nan) and teacher.model is None
    assert teacher.offer(student, 0.5)
    first = teacher.model
    assert not teacher.offer(student, 0.5) and not teacher.offer(student, 0.6) and not teacher.offer(student, math.nan)
    assert teacher.model is first and teacher.best_loss == 0.5
    assert teacher.offer(student, 0.4)
    assert teacher.model is not first and teacher.best_loss == 0.4


@pytest.mark.parametrize("one_dtype", [True, False])
def test_a_snapshot_from_a_file_gets_one_type_only_where_its_student_has_one(one_dtype: bool) -> None:
    """Adapters of a bfloat16 model are float32, in a resumed run too; under DeepSpeed all is bfloat16."""
    student, teacher = tiny().bfloat16(), Teacher(HIDDEN)
    student.classifier.float()
    teacher.offer(student, 0.5)
    teacher.join(student, one_dtype)
    assert teacher.model is not None
    expected = torch.bfloat16 if one_dtype else torch.float32
    assert teacher.model.classifier.weight.dtype == expected
    assert teacher.model.bert.pooler.dense.weight.dtype == torch.bfloat16


def test_follow_tracks_hidden_dimensions_between_snapshots() -> None:
    teacher = Teacher(6)
    teacher.follow(torch.tensor([0, 2, 3, 5]))  # before there is a teacher
    teacher.offer(nn.Linear(1, 1), 0.5)
    assert teacher.num_hidden == 4 and teacher.hidden_index is not None
    assert teacher.hidden_index.tolist() == [0, 1, 2, 3]
    teacher.follow(torch.tensor([1, 2, 3]))
    teacher.follow(torch.tensor([0, 2]))
    assert teacher.hidden_index.tolist() == [1, 3] and teacher.num_hidden == 4


def test_own_lets_the_student_train_more() -> None:
    student, teacher = tiny(), Teacher(HIDDEN)
    teacher.offer(student, 0.5)
    before = teacher.forward(batch()).logits
    more = [p for p in student.parameters() if not p.requires_grad]
    for parameter in more:
        parameter.requires_grad_(True)
    with pytest.raises(AssertionError, match="own"):
        teacher.forward(batch())
    teacher.own(more)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(1.0)
    assert torch.equal(teacher.forward(batch()).logits, before)
    Teacher(HIDDEN).own(more)  # nothing to do without a snapshot


def test_external_teacher_is_frozen_and_takes_no_snapshot() -> None:
    model = tiny()
    teacher = Teacher.external(model)
    assert teacher.num_hidden == HIDDEN and teacher.hidden_index is None
    assert not any(p.requires_grad for p in model.parameters()) and not model.training
    assert not teacher.offer(tiny(), 0.0) and teacher.model is model
    teacher.follow(torch.tensor([1]))
    assert teacher.hidden_index is None
    assert torch.equal(teacher.forward(batch()).logits, logits(model))


def test_state_survives_a_round_trip() -> None:
    teacher, resumed = Teacher(6), Teacher(2)
    teacher.offer(nn.Linear(1, 1), 0.25)
    teacher.follow(torch.tensor([1, 4]))
    resumed.load_state_dict(copy.deepcopy(teacher.state_dict()))
    assert resumed.best_loss == 0.25 and resumed.num_hidden == 6
    assert resumed.hidden_index is not None and resumed.hidden_index.tolist() == [1, 4]


# --- losses ----------------------------------------------------------------------------------------------------------


def kl_by_hand(student: np.ndarray, teacher: np.ndarray, temperature: float) -> np.ndarray:
    """KL over the last axis, times temperature squared."""
    divergence = rel_entr(softmax(teacher / temperature, -1), softmax(student / temperature, -1)).sum(-1)
    return temperature**2 * divergence


@pytest.mark.parametrize("temperature", [2 / 3, 1.0, 2.0])
def test_classification_loss_is_the_mean_kl(temperature: float) -> None:
    student, teacher = (torch.randn(5, 3, generator=torch.Generator().manual_seed(i)) for i in (0, 1))
    loss = prediction_loss(
        SequenceClassifierOutput(logits=student), SequenceClassifierOutput(logits=teacher), temperature
    )
    expected = kl_by_hand(student.double().numpy(), teacher.double().numpy(), temperature).mean()
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    same = SequenceClassifierOutput(logits=student)
    assert prediction_loss(same, same, temperature).item() == pytest.approx(0.0, abs=1e-7)


def test_prediction_loss_is_in_float32_and_reaches_only_the_student() -> None:
    student = torch.randn(5, 3, dtype=torch.bfloat16, requires_grad=True)
    teacher = torch.randn(5, 3, dtype=torch.bfloat16)
    loss = prediction_loss(SequenceClassifierOutput(logits=student), SequenceClassifierOutput(logits=teacher), 2.0)
    assert loss.dtype == torch.float32 and loss.shape == ()
    loss.backward()
    grad = 2.0 * (softmax(student.detach().float() / 2, -1) - softmax(teacher.float() / 2, -1)) / 5
    torch.testing.assert_close(student.grad.float(), torch.as_tensor(grad), atol=2e-3, rtol=1e-2)


def test_regression_loss_is_the_squared_error() -> None:
    student, teacher = torch.tensor([[1.0], [2.0]]), torch.tensor([[0.0], [5.0]])
    loss = prediction_loss(SequenceClassifierOutput(logits=student), SequenceClassifierOutput(logits=teacher), 2.0)
    assert loss.item() == pytest.approx((1 + 9) / 2)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_loss_of_several_labels_is_the_bernoulli_kl(temperature: float) -> None:
    """Summed over labels: of three, with logits -3 where the teacher has 3, 3 · 3 · (2σ(3) - 1) = 8.146."""
    generator = np.random.default_rng(5)
    student, teacher = generator.normal(size=(2, 6, 4)) * 3
    p, q = (1 / (1 + np.exp(-x / temperature)) for x in (teacher, student))
    by_hand = temperature**2 * (p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))).sum(axis=1).mean()
    outputs = [SequenceClassifierOutput(logits=torch.tensor(x)) for x in (student, teacher)]
    loss = prediction_loss(*outputs, temperature, problem="multi_label_classification")
    assert loss.item() == pytest.approx(by_hand, rel=1e-5)
    for ours, theirs, expected in ((-3.0, 3.0, 8.14629), (3.0, -3.0, 8.14629), (5.0, 0.0, 5.44070), (200.0, 200.0, 0)):
        outputs = [SequenceClassifierOutput(logits=torch.full((2, 3), x)) for x in (ours, theirs)]
        loss = prediction_loss(*outputs, 1.0, problem="multi_label_classification")
        assert loss.item() == pytest.approx(expected, rel=1e-4)


def test_loss_of_several_numbers_is_the_squared_error() -> None:
    student, teacher = (SequenceClassifierOutput(logits=torch.full((2, 3), x)) for x in (5.0, 0.0))
    assert prediction_loss(student, teacher, 4.0, problem="regression").item() == 25.0


def test_token_loss_is_the_mean_kl_over_real_tokens() -> None:
    student, teacher = random_hidden(2, (2, 4, 3), 0)
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0]])
    outputs = TokenClassifierOutput(logits=student), TokenClassifierOutput(logits=teacher)
    per_token = kl_by_hand(student.double().numpy(), teacher.double().numpy(), 2.0)
    expected = per_token[mask.numpy() == 1].mean()
    assert prediction_loss(*outputs, 2.0, mask).item() == pytest.approx(expected, rel=1e-5)
    assert prediction_loss(*outputs, 2.0).item() == pytest.approx(per_token.mean(), rel=1e-5)
    assert prediction_loss(*outputs, 2.0, torch.zeros_like(mask)).item() == 0.0


def qa_output(seed: int, padding: int = 0, garbage: float = 0.0) -> QuestionAnsweringModelOutput:
    start, end = (nn.functional.pad(x, (0, padding), value=garbage) for x in random_hidden(2, (3, 5), seed))
    return QuestionAnsweringModelOutput(start_logits=start, end_logits=end)


def test_question_answering_loss_is_the_mean_of_start_and_end() -> None:
    student, teacher = qa_output(0), qa_output(1)
    expected = np.mean(
        [
            kl_by_hand(student[name].double().numpy(), teacher[name].double().numpy(), 2.0).mean()
            for name in ("start_logits", "end_logits")
        ]
    )
    assert prediction_loss(student, teacher, 2.0).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("temperature", [2 / 3, 2.0])
def test_padding_changes_no_question_answering_loss(temperature: float) -> None:
    mask = nn.functional.pad(torch.ones(3, 5), (0, 4))
    student, teacher = qa_output(0, padding=4, garbage=9.0), qa_output(1, padding=4, garbage=-3.0)
    student.start_logits.requires_grad_()
    loss = prediction_loss(student, teacher, temperature, mask)
    assert loss.item() == pytest.approx(prediction_loss(qa_output(0), qa_output(1), temperature).item(), rel=1e-5)
    loss.backward()
    assert student.start_logits.grad[:, 5:].abs().max() == 0
    assert student.start_logits.grad[:, :5].isfinite().all()


def test_padding_changes_no_token_or_layer_loss() -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 2, 6, 4, generator=generator)
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0]])
    student[mask == 0], teacher[mask == 0] = math.nan, math.inf
    short, short_mask = slice(0, 4), mask[:, :4]
    args = student[:, short].clone().requires_grad_(), teacher[:, short], nn.Identity(), short_mask
    long = student.clone().requires_grad_()
    for normalise in (False, True):
        loss = hidden_distance(long, teacher, nn.Identity(), mask, normalise)
        assert loss.item() == pytest.approx(hidden_distance(*args, normalise).item(), rel=1e-6)
        assert loss.isfinite()
    hidden_distance(long, teacher, nn.Identity(), mask).backward()
    assert long.grad.isfinite().all() and long.grad[mask == 0].abs().max() == 0


@pytest.mark.parametrize("normalise", [False, True])
def test_layer_loss_against_loops(normalise: bool) -> None:
    student, teacher = random_hidden(3, (2, 3, 4), 0), random_hidden(3, (2, 3, 6), 1)
    transform = HiddenTransform(4, 6, rank=2, hidden_index=torch.tensor([0, 2, 3, 5]))
    nn.init.normal_(transform.lora_B)
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    pairs = [(0, 0), (0, 1), (2, 2)]
    expected = 0.0
    for s, t in pairs:
        total, count = 0.0, 0
        for b in range(2):
            for position in range(3):
                if mask[b, position] == 0:
                    continue
                x, y = transform(student[s][b, position]).double(), teacher[t][b, position].double()
                if normalise:
                    x, y = x / (x.square().mean() + 1e-6).sqrt(), y / (y.square().mean() + 1e-6).sqrt()
                total += (x - y).square().sum().item()
                count += 6
        expected += total / count
    loss = layer_loss(student, teacher, pairs, transform, mask, normalise)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    everything = layer_loss(student, teacher, [(1, 1)], transform)
    assert everything.item() == pytest.approx((transform(student[1]) - teacher[1]).square().mean().item(), rel=1e-6)


def test_layer_loss_without_pairs_is_zero() -> None:
    loss = layer_loss(random_hidden(1, (2, 3, 4), 0), random_hidden(1, (2, 3, 4), 1), [], nn.Identity())
    assert loss.item() == 0.0 and loss.shape == ()


def test_a_single_real_position_leaves_nothing_to_learn() -> None:
    """Even where logits are extreme and the temperature is low: 0·(a − b) stays 0 at hidden positions."""
    big = QuestionAnsweringModelOutput(start_logits=torch.tensor([[1e4, 0.0]]), end_logits=torch.tensor([[0.0, 1e4]]))
    small = QuestionAnsweringModelOutput(start_logits=torch.zeros(1, 2), end_logits=torch.zeros(1, 2))
    loss = prediction_loss(big, small, 0.01, torch.tensor([[1, 0]]))
    assert loss.item() == 0.0


# --- layer map -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_layers", range(1, 14))
@pytest.mark.parametrize("num_blocks", [1, 3, 4, 6])
def test_sampling_covers_every_block_and_every_layer(num_layers: int, num_blocks: int) -> None:
    blocks = [set(block.tolist()) for block in np.array_split(np.arange(num_layers), min(num_blocks, num_layers))]
    seen: set[int] = set()
    for step in range(120):
        layers = sample_teacher_layers(num_layers, num_blocks, 7, step, "dynamic")
        assert len(layers) == len(blocks) and list(layers) == sorted(set(layers))
        seen |= set(layers)
    assert seen == set(range(num_layers))
    sizes = Counter(_block_sizes(num_layers, num_blocks))
    assert sizes == Counter(len(block) for block in blocks)
    static = sample_teacher_layers(num_layers, num_blocks, 7, 0, "static")
    assert static[-1] == num_layers - 1 and static == sample_teacher_layers(num_layers, num_blocks, 8, 5, "static")


def _block_sizes(num_layers: int, num_blocks: int) -> list[int]:
    """Sizes of the blocks, from the last layer of each."""
    ends = sample_teacher_layers(num_layers, num_blocks, 0, 0, "static")
    return [end - before for before, end in zip((-1, *ends), ends, strict=False)]


def test_each_draw_stays_in_its_block() -> None:
    ends = sample_teacher_layers(11, 4, 0, 0, "static")
    starts = (0, *(end + 1 for end in ends[:-1]))
    for step in range(200):
        for layer, start, end in zip(sample_teacher_layers(11, 4, 3, step, "dynamic"), starts, ends, strict=True):
            assert start <= layer <= end


def test_sampling_depends_on_seed_and_step_only() -> None:
    def draw(seed: int) -> list[tuple[int, ...]]:
        return [sample_teacher_layers(12, 4, seed, step, "dynamic") for step in range(50)]

    first = draw(0)
    torch.manual_seed(123)
    state = torch.random.get_rng_state()
    assert draw(0) == first
    assert torch.equal(torch.random.get_rng_state(), state)
    assert draw(1) != first and len(set(first)) > 20


def test_sampling_is_uniform_in_a_block() -> None:
    counts = Counter(sample_teacher_layers(12, 4, 42, step, "dynamic")[1] for step in range(3000))
    assert set(counts) == {3, 4, 5} and all(900 < count < 1100 for count in counts.values())


def test_sampling_modes() -> None:
    assert sample_teacher_layers(12, 4, 0, 0, "none") == ()
    assert sample_teacher_layers(12, 4, 0, 0, "static") == (2, 5, 8, 11)
    with pytest.raises(UserError, match="Did you mean 'dynamic'"):
        sample_teacher_layers(12, 4, 0, 0, "dynamics")


def test_living_layers_meet_their_own() -> None:
    hidden = random_hidden(4, (1, 2, 3), 0)
    assert match_layers((0, 2, 3), [True] * 4, hidden, hidden, nn.Identity()) == [(0, 0), (2, 2), (3, 3)]


def test_dead_layers_meet_the_closer_neighbour() -> None:
    student, teacher = random_hidden(5, (2, 3, 4), 0), random_hidden(5, (2, 3, 4), 1)
    alive = [True, False, False, True, False]
    student[0] = teacher[1] + 0.1  # the one below is closer to 1
    student[3] = teacher[2] + 0.1  # the one above is closer to 2
    pairs = match_layers((0, 1, 2, 3, 4), alive, student, teacher, nn.Identity())
    assert pairs == [(0, 0), (0, 1), (3, 2), (3, 3), (3, 4)]


def test_without_living_layers_all_are_skipped() -> None:
    hidden = random_hidden(3, (2, 3, 4), 0)
    assert match_layers((0, 2), [False] * 3, hidden, hidden, nn.Identity()) == []


def test_neighbours_are_compared_on_real_tokens_only() -> None:
    teacher = [torch.zeros(1, 2, 4) for _ in range(3)]
    student = [torch.zeros(1, 2, 4), torch.zeros(1, 2, 4), torch.full((1, 2, 4), 0.5)]
    student[0][:, 0] = 1.0  # the real token of the one below is further off
    student[2][:, 1] = 9.0  # the padded token of the one above is
    alive = [True, False, True]
    assert match_layers((1,), alive, student, teacher, nn.Identity(), torch.tensor([[1, 0]])) == [(2, 1)]
    assert match_layers((1,), alive, student, teacher, nn.Identity()) == [(0, 1)]


def test_a_deeper_teacher_meets_the_same_relative_depth() -> None:
    student, teacher = random_hidden(6, (1, 2, 3), 0), random_hidden(12, (1, 2, 3), 1)
    pairs = match_layers((0, 1, 5, 11), [True] * 6, student, teacher, nn.Identity())
    assert pairs == [(0, 0), (0, 1), (2, 5), (5, 11)]


def test_the_device_is_asked_only_where_there_is_a_choice() -> None:
    hidden = [torch.empty(1, 2, 3, device="meta") for _ in range(3)]  # a meta tensor cannot be read
    assert match_layers((0, 1), [False, False, True], hidden, hidden, nn.Identity()) == [(2, 0), (2, 1)]
    with pytest.raises(RuntimeError):
        match_layers((1,), [True, False, True], hidden, hidden, nn.Identity())


# --- transform -------------------------------------------------------------------------------------------------------


def trained(num_student: int, num_teacher: int, index: torch.Tensor | None = None) -> HiddenTransform:
    generator = torch.Generator().manual_seed(0)
    transform = HiddenTransform(num_student, num_teacher, 3, hidden_index=index, generator=generator)
    nn.init.normal_(transform.lora_B, generator=generator)
    return transform


def by_hand(transform: HiddenTransform, hidden: torch.Tensor) -> torch.Tensor:
    scatter = torch.zeros(transform.num_teacher, transform.num_student)
    for column, row in enumerate(transform.hidden_index.tolist()):
        scatter[row, column] = 1.0
    return hidden @ (scatter + transform.scaling * transform.lora_B @ transform.lora_A).T


def test_transform_is_the_identity_at_the_start() -> None:
    hidden = torch.randn(2, 3, 6)
    for rank in (0, 8):
        transform = HiddenTransform(6, 6, rank)
        assert torch.equal(transform(hidden), hidden) and transform.rank == rank
        assert "hidden_index" in transform.state_dict()
    assert transform.lora_A.abs().max() <= 6**-0.5 and transform.lora_A.abs().max() > 0.8 * 6**-0.5
    assert not list(HiddenTransform(6, 6, 0).parameters())


def test_transform_scatters_after_a_cut() -> None:
    transform, index = HiddenTransform(6, 6), torch.tensor([0, 2, 5])
    edits = transform.cut_inputs(index)
    assert [(name, dim, kept.tolist()) for name, dim, kept in edits] == [("lora_A", 1, [0, 2, 5])]
    hidden = torch.randn(2, 3, 3)
    expected = torch.zeros(2, 3, 6)
    expected[..., index] = hidden
    assert torch.equal(transform(hidden), expected)
    assert HiddenTransform(6, 6, 0).cut_inputs(index) == []


def test_cuts_in_sequence_equal_one_with_zeros_in_the_dense_transform() -> None:
    dense, cut = trained(6, 6), trained(6, 6)
    old = cut.lora_A
    cut.cut_inputs(torch.tensor([0, 2, 3, 5]))
    cut.cut_inputs(torch.tensor([1, 3]))
    assert cut.lora_A is not old and isinstance(cut.lora_A, nn.Parameter) and cut.lora_A.requires_grad
    assert cut.hidden_index.tolist() == [2, 5]
    hidden = torch.randn(2, 3, 2)
    wide = torch.zeros(2, 3, 6)
    wide[..., [2, 5]] = hidden
    torch.testing.assert_close(cut(hidden), dense(wide))
    torch.testing.assert_close(cut(hidden), by_hand(cut, hidden))


def test_transform_follows_a_new_teacher() -> None:
    transform = trained(6, 6)
    transform.cut_inputs(torch.tensor([0, 2, 5]))
    hidden = torch.randn(2, 3, 3)
    before = transform(hidden)
    edits = transform.retarget()
    assert [(name, dim, kept.tolist()) for name, dim, kept in edits] == [("lora_B", 0, [0, 2, 5])]
    assert transform.num_teacher == 3 and transform.hidden_index.tolist() == [0, 1, 2]
    torch.testing.assert_close(transform(hidden), before[..., [0, 2, 5]])


def test_growth_leaves_outputs_bit_identical() -> None:
    transform = trained(4, 6, torch.tensor([0, 2, 3, 5]))
    with torch.no_grad():  # small whole numbers: exact sums whatever the order in which a kernel adds
        transform.lora_A.copy_(torch.randint(-3, 4, (3, 4)))
        transform.lora_B.copy_(torch.randint(-3, 4, (6, 3)))
    hidden = torch.randint(-3, 4, (2, 3, 4)).float()
    before = transform(hidden)
    assert transform.grow(5, torch.Generator().manual_seed(3)) == [("lora_A", 0, 5), ("lora_B", 1, 5)]
    assert transform.rank == 8 and transform.lora_A.shape == (8, 4) and transform.lora_B.shape == (6, 8)
    assert torch.equal(transform(hidden), before)
    assert 0 < transform.lora_A[3:].abs().max() <= 4**-0.5 and transform.lora_B[:, 3:].abs().max() == 0


def test_growth_depends_on_its_generator_only() -> None:
    one, other = trained(4, 4), trained(4, 4)
    one.grow(2, torch.Generator().manual_seed(5))
    torch.manual_seed(99)
    other.grow(2, torch.Generator().manual_seed(5))
    assert torch.equal(one.lora_A, other.lora_A)
    flat = HiddenTransform(4, 4, 0)
    flat.grow(2)
    hidden = torch.randn(1, 2, 4)
    assert flat.rank == 2 and torch.equal(flat(hidden), hidden)


def test_transform_learns() -> None:
    transform = HiddenTransform(4, 6, 2, hidden_index=torch.tensor([0, 1, 2, 3]))
    hidden, goal = torch.randn(2, 3, 4), torch.randn(2, 3, 6)
    optimizer = torch.optim.Adam(transform.parameters(), lr=0.05)
    losses = []
    for _ in range(50):
        loss = hidden_distance(hidden, goal, transform)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_other_width_needs_a_low_rank_part() -> None:
    hidden = torch.randn(2, 3, 4)
    transform = HiddenTransform(4, 6, 2)
    assert torch.equal(transform(hidden), torch.zeros(2, 3, 6))
    nn.init.ones_(transform.lora_B)
    transform.cut_inputs(torch.tensor([0, 3]))
    assert transform(hidden[..., :2]).shape == (2, 3, 6)
    with pytest.raises(UserError, match="6 hidden dimensions and the student 4"):
        HiddenTransform(4, 6, 0)


def test_transform_state_survives_a_round_trip() -> None:
    transform = trained(6, 6)
    transform.cut_inputs(torch.tensor([1, 4, 5]))
    state = transform.state_dict()
    resumed = HiddenTransform(3, 6, transform.rank, hidden_index=state["hidden_index"].clone())
    resumed.load_state_dict(state)
    hidden = torch.randn(1, 2, 3)
    assert torch.equal(resumed(hidden), transform(hidden))


# --- together --------------------------------------------------------------------------------------------------------


def test_losses_vanish_right_after_a_snapshot_and_train_the_student_after() -> None:
    student = tiny(dropout=0.0)
    teacher, transform = Teacher(HIDDEN), HiddenTransform(HIDDEN, HIDDEN)
    teacher.offer(student, 0.5)
    inputs = batch(padding=3)

    def total() -> torch.Tensor:
        ours = student(**inputs, output_hidden_states=True)
        theirs = teacher.forward(inputs, output_hidden_states=True)
        ours_hidden, theirs_hidden = layer_outputs(ours), layer_outputs(theirs)
        mask = inputs["attention_mask"]
        pairs = match_layers(range(LAYERS), [True] * LAYERS, ours_hidden, theirs_hidden, transform, mask)
        return prediction_loss(ours, theirs, 2.0, mask) + layer_loss(
            ours_hidden, theirs_hidden, pairs, transform, mask
        )

    assert total().item() == pytest.approx(0.0, abs=1e-6)
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if "lora_B" in name:
                parameter.mul_(-1.0)
    first = total()
    first.backward()
    assert first.item() > 1e-4
    assert all((p.grad is not None) == p.requires_grad for p in student.parameters())
    optimizer = torch.optim.Adam([p for p in student.parameters() if p.requires_grad], lr=0.02)
    for _ in range(20):
        loss = total()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.5 * first.item()


def test_base_model_without_a_head_can_teach() -> None:
    model = tiny(BertModel)
    teacher = Teacher(HIDDEN)
    teacher.offer(model, 1.0)
    assert len(layer_outputs(teacher.forward(unlabelled(), output_hidden_states=True))) == LAYERS
