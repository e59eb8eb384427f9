"""Sums of taps against the same sums from captured tensors and ``torch.autograd.grad``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import pytest
import torch
from tiny import FAMILY_NAMES, HEADS, LANGUAGE_MODELS, adapted, hooks, parts, tiny_batch, tiny_model
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from apt_trainer.scoring.taps import Tap, TapContext
from apt_trainer.settings import MethodSettings
from apt_trainer.surgery.masks import MaskStore
from apt_trainer.surgery.tuning import set_trainable

Place = tuple[str, str]
Seen = dict[Place, tuple[torch.Tensor, torch.Tensor]]


def places_of(model: PreTrainedModel) -> list[Place]:
    """Every place that an observer may tap: inputs of output projections, outputs of norms."""
    _, spaces, _ = parts(model)
    return [(s.gate, "input") for s in spaces if s.gate] + [(path, "output") for path in spaces[-1].places]


def observe_by_hand(model: nn.Module, batch: Mapping[str, torch.Tensor], places: Sequence[Place]) -> Seen:
    """Activation and gradient of the loss per place; a gradient that does not exist is 0."""
    tensors: dict[Place, torch.Tensor] = {}
    handles = []

    def keep_input(place: Place, module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        tensors[place] = args[0]

    def keep_output(place: Place, module: nn.Module, args: object, output: torch.Tensor) -> None:
        tensors[place] = output

    for path, side in places:
        module = model.get_submodule(path)
        if side == "input":
            handles.append(module.register_forward_pre_hook(partial(keep_input, (path, side))))
        else:
            handles.append(module.register_forward_hook(partial(keep_output, (path, side))))
    loss = model(**batch).loss
    wanted = [place for place in places if tensors[place].requires_grad]
    gradients = torch.autograd.grad(loss, [tensors[place] for place in wanted], allow_unused=True)
    for handle in handles:
        handle.remove()
    found = dict(zip(wanted, gradients, strict=True))
    return {
        place: (x.detach(), torch.zeros_like(x) if found.get(place) is None else found[place])
        for place, x in tensors.items()
    }


def tap_all(
    model: nn.Module,
    places: Sequence[Place],
    context: TapContext,
    measure: str = "magnitudes",
    units: int | None = None,
) -> tuple[dict[Place, torch.Tensor], list[Tap]]:
    sums, taps = {}, []
    for path, side in places:
        module = model.get_submodule(path)
        layer = getattr(module, "base_layer", module)
        rows, columns = layer.weight.shape if layer.weight.dim() == 2 else (len(layer.weight), 0)
        width = rows if (side == "input") == isinstance(layer, Conv1D) else columns
        sums[path, side] = torch.zeros(3, width) if measure == "magnitudes" else torch.zeros(1, units or width)
        taps.append(Tap(module, side, measure, sums[path, side], context))
    return sums, taps


def expected_sums(seen: Seen, mask: torch.Tensor | None) -> dict[Place, torch.Tensor]:
    """[3, n]: Σ|x|, Σ|g|, Σx over real tokens; a place without gradient has 0 in all."""
    result = {}
    for place, (x, g) in seen.items():
        weights = torch.ones(x.shape[:2]) if mask is None else mask.float()
        rows = [torch.einsum("bt,btn->n", weights, tensor) for tensor in (x.abs(), g.abs(), x)]
        result[place] = torch.stack(rows)
    return result


def assert_close(
    sums: Mapping[Place, torch.Tensor], expected: Mapping[Place, torch.Tensor], rtol: float = 1e-4
) -> None:
    assert sums.keys() == expected.keys()
    for place, value in sums.items():
        assert torch.allclose(value, expected[place], rtol=rtol, atol=1e-6), place


@pytest.mark.parametrize("masked", [False, True], ids=["all_tokens", "real_tokens"])
@pytest.mark.parametrize("task", ["ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering"])
@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_magnitudes_equal_explicit_sums(name: str, task: str, masked: bool) -> None:
    model = tiny_model(name, task).train()
    batch, places, context = tiny_batch(model), places_of(model), TapContext()
    seen = observe_by_hand(model, batch, places)
    mask = batch["attention_mask"] if masked else None
    context.set_tokens(mask)
    sums, _ = tap_all(model, places, context)
    model(**batch).loss.backward()
    assert_close(sums, expected_sums(seen, mask))
    assert all(value.abs().sum(1).min() > 0 for value in sums.values())
    if masked:  # padding really was there to be left out
        assert not torch.allclose(next(iter(sums.values())), next(iter(expected_sums(seen, None).values())), rtol=1e-2)


def test_a_mask_that_does_not_describe_the_activation_is_not_used() -> None:
    context, linear = TapContext(), nn.Linear(4, 3)
    context.set_tokens(torch.zeros(2, 5))
    for shape in [(2, 4), (3, 5, 4), (2, 6, 4)]:
        sums = torch.zeros(3, 4)
        tap, x = Tap(linear, "input", "magnitudes", sums, context), torch.randn(shape, requires_grad=True)
        linear(x).sum().backward()
        tap.remove()
        assert torch.allclose(sums[0], x.detach().abs().reshape(-1, 4).sum(0), atol=1e-5)
    sums = torch.zeros(3, 4)
    Tap(linear, "input", "magnitudes", sums, context)
    linear(torch.randn(2, 5, 4, requires_grad=True)).sum().backward()
    assert not sums.any()  # this one it does describe
    context.set_tokens(None)
    linear(torch.randn(2, 5, 4, requires_grad=True)).sum().backward()
    assert bool((sums[0] > 0).all())


@pytest.mark.parametrize("measure", ["signed", "per_sequence"])
@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_products_equal_explicit_sums(name: str, measure: str) -> None:
    model = tiny_model(name, "ForTokenClassification").train()
    batch = tiny_batch(model)
    places = [place for place in places_of(model) if place[1] == "input" and "attention" in place[0]]
    assert len(places) == 3
    seen = observe_by_hand(model, batch, places)
    sums, _ = tap_all(model, places, TapContext(), measure, HEADS if measure == "per_sequence" else None)
    model(**batch).loss.backward()
    for place, (x, g) in seen.items():
        product = (x * g).double()
        if measure == "signed":
            expected = product.sum((0, 1))
        else:
            expected = product.view(*product.shape[:2], HEADS, -1).sum((1, 3)).abs().sum(0)
        assert torch.allclose(sums[place][0].double(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("measure", ["magnitudes", "per_sequence"])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_gradient_checkpointing_records_each_forward_once(name: str, reentrant: bool, measure: str) -> None:
    results = []
    for checkpointing in (False, True):
        model = tiny_model(name, dropout=0.1).train()
        model.enable_input_require_grads()  # without it a re-entrant checkpoint has no gradient for the first layer
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
        batch, context = tiny_batch(model), TapContext()
        context.set_tokens(batch["attention_mask"])
        sums, _ = tap_all(model, places_of(model), context, measure)
        torch.manual_seed(5)
        for _ in range(2):
            model(**batch).loss.backward()
        results.append((sums, {key: p.grad for key, p in model.named_parameters() if p.grad is not None}))
    (sums, gradients), (again, gradients_again) = results
    assert_close(again, sums, rtol=1e-5)
    assert all(value.any() for value in sums.values())
    assert gradients.keys() == gradients_again.keys()
    assert all(torch.allclose(gradients[key], gradients_again[key], atol=1e-6) for key in gradients)


@pytest.mark.parametrize("measure", ["magnitudes", "signed", "per_sequence"])
@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_four_micro_batches_of_one_equal_one_batch_of_four(name: str, measure: str) -> None:
    """For a mean loss, whose parts are divided by the number of micro-batches."""
    model = tiny_model(name).train()
    batch, context, places = tiny_batch(model), TapContext(), places_of(model)
    sums, taps = tap_all(model, places, context, measure)
    context.set_tokens(batch["attention_mask"])
    model(**batch).loss.backward()
    [tap.remove() for tap in taps]
    parts_of_it, _ = tap_all(model, places, context, measure)
    for row in range(4):
        micro = {key: value[row : row + 1] for key, value in batch.items()}
        context.set_tokens(micro["attention_mask"])
        (model(**micro).loss / 4).backward()
    assert_close(parts_of_it, sums)


def test_two_forwards_before_their_backwards_keep_their_own_mask_and_sums() -> None:
    model = tiny_model("bert").train()
    batch, context, places = tiny_batch(model), TapContext(), places_of(model)
    sums, taps = tap_all(model, places, context)
    halves = [{key: value[rows] for key, value in batch.items()} for rows in (slice(0, 2), slice(2, 4))]
    expected = {place: 0.0 for place in places}
    for half in halves:
        [tap.remove() for tap in taps]
        for place, value in expected_sums(observe_by_hand(model, half, places), half["attention_mask"]).items():
            expected[place] = expected[place] + value
    sums, _ = tap_all(model, places, context)
    losses = []
    for half in halves:
        context.set_tokens(half["attention_mask"])
        losses.append(model(**half).loss)
    for loss in losses:
        loss.backward()
    assert_close(sums, expected)


@pytest.mark.parametrize("situation", ["eval", "no_grad", "inference", "no_backward"])
def test_nothing_is_recorded_without_training(situation: str) -> None:
    model = tiny_model("distilbert").train(situation != "eval")
    batch = tiny_batch(model)
    sums, _ = tap_all(model, places_of(model), TapContext())
    if situation == "eval":
        model(**batch).loss.backward()
    elif situation == "no_backward":
        assert model(**batch).loss.requires_grad
    else:
        with torch.no_grad() if situation == "no_grad" else torch.inference_mode():
            model(**batch)
    assert not any(value.any() for value in sums.values())


def test_a_place_without_gradient_records_0() -> None:
    """With frozen embeddings and norms nothing below the first adapter has a gradient."""
    model = tiny_model("bert").train()
    family, spaces, _ = parts(model)
    adapted(model)
    set_trainable(model, family, "adapters", MethodSettings(), ())
    places = places_of_adapted(model, spaces)
    seen = observe_by_hand(model, tiny_batch(model), places)
    sums, _ = tap_all(model, places, TapContext())
    model(**tiny_batch(model)).loss.backward()
    below = ("bert.embeddings.LayerNorm", "output")
    assert not sums[below].any()
    others = {place: value for place, value in sums.items() if place != below}
    assert_close(others, {place: value for place, value in expected_sums(seen, None).items() if place != below})
    assert all(value[1].all() for value in others.values())


def places_of_adapted(model: nn.Module, spaces: list) -> list[Place]:
    return [(s.gate, "input") for s in spaces if s.gate] + [(path, "output") for path in spaces[-1].places]


@pytest.mark.parametrize("measure", ["magnitudes", "signed", "per_sequence"])
@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_a_tap_is_an_identity(name: str, measure: str) -> None:
    results = []
    for tapped in (False, True):
        model = tiny_model(name, dropout=0.1).train()
        batch, before = tiny_batch(model), hooks(model)
        if tapped:
            _, taps = tap_all(model, places_of(model), TapContext(), measure)
        torch.manual_seed(5)
        output = model(**batch)
        output.loss.backward()
        results.append([output.loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
        if tapped:
            assert hooks(model) == before + len(taps)
            [tap.remove() for tap in taps]
        assert hooks(model) == before
    assert len(results[0]) == len(results[1]) > 20
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("measure", ["magnitudes", "signed", "per_sequence"])
def test_sums_are_single_precision_whatever_the_activations_are(measure: str) -> None:
    linear = nn.Linear(8, 3).bfloat16()
    sums = torch.zeros(3 if measure == "magnitudes" else 1, 8)
    Tap(linear, "input", measure, sums, TapContext())
    x = torch.randn(64, 50, 8).bfloat16().requires_grad_()
    weight = torch.randn(64, 50, 3).bfloat16()
    (linear(x) * weight).sum().backward()
    value, gradient = x.detach().double(), x.grad.double()
    if measure == "magnitudes":
        expected = torch.stack([value.abs().sum((0, 1)), gradient.abs().sum((0, 1)), value.sum((0, 1))])
    elif measure == "signed":
        expected = (value * gradient).sum((0, 1))[None]
    else:
        expected = (value * gradient).sum(1).abs().sum(0)[None]
    assert torch.allclose(sums.double(), expected, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("name", [*FAMILY_NAMES, *LANGUAGE_MODELS])
def test_what_fades_is_observed_as_it_is_computed_with(name: str) -> None:
    """A tap that is put on before masks still sees every place; masks next to 1 change what it sees by little."""
    model = tiny_model(name, LANGUAGE_MODELS.get(name, "ForSequenceClassification")).train()
    batch, (family, spaces, dense) = tiny_batch(model), parts(model)
    sums, taps = tap_all(model, places_of(model), TapContext())
    model(**batch).loss.backward()
    plain = {place: of_place.clone() for place, of_place in sums.items()}
    masks = MaskStore(model, spaces, family.sublayers(model))
    masks.open(dense.counts)
    masks.move({space.name: torch.arange(1) for space in spaces}, 1e-4)
    for of_place in sums.values():
        of_place.zero_()
    model(**batch).loss.backward()
    for place, of_place in sums.items():
        torch.testing.assert_close(of_place, plain[place], rtol=0.02, atol=2e-3 * float(plain[place].abs().max()))
    assert any(not torch.equal(of_place, plain[place]) for place, of_place in sums.items())
    for tap in taps:
        tap.remove()
