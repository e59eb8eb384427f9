"""What happens at which step, by hand and for many lengths of runs."""

from __future__ import annotations

import math

import pytest

from apt_trainer.errors import UserError
from apt_trainer.plan.schedule import Schedule, make_schedule
from apt_trainer.settings import MethodSettings


def schedule(total: int = 1000, **settings: object) -> Schedule:
    """The weight of distillation is that of APT."""
    return make_schedule(MethodSettings(**{"distillation_weight": 1.0, **settings}), total)  # type: ignore[arg-type]


def test_defaults_of_early_pruning() -> None:
    s = schedule()
    assert (s.start, s.events, s.end) == (100, (140, 180, 220, 260, 300), 300)
    assert (s.window, s.mask_step) == (40, 0.05)
    assert (s.distillation_start, s.distillation_end) == (100, 600)
    assert s.total == 1000


def test_defaults_of_late_pruning() -> None:
    s = schedule(pruning_time="late")
    assert (s.start, s.events) == (500, (550, 600, 650, 700, 750))
    assert (s.distillation_start, s.distillation_end) == (500, 750)  # not before the last event


def test_pruning_before_training_has_events_for_ranks_only() -> None:
    s = schedule(pruning_time="before", distillation="none")
    assert s.before and (s.start, s.events, s.end) == (0, (60, 120, 180, 240, 300), 300)
    assert (s.window, s.mask_step) == (0, 1.0)
    assert [s.sparsity(j) for j in range(5)] == [0.6] * 5
    assert [s.tuning_share(j) for j in range(5)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert not any(s.in_window(step) is not None for step in range(1001))
    assert not any(schedule(pruning_time=time).before for time in ("early", "late"))


def test_a_model_as_teacher_counts_in_full_when_ranks_have_grown() -> None:
    s = schedule(pruning_time="before", distillation="model", teacher_name_or_path="t", pruning_end=200)
    assert (s.distillation_start, s.distillation_end) == (0, 600)
    assert s.mu(0) == pytest.approx(1 / 200) and s.mu(199) == s.mu(599) == 1.0


def test_without_a_target_nothing_happens_before_training() -> None:
    s = schedule(pruning_time="before", target_sparsity=None)
    assert (s.before, s.events, s.distillation_end) == (False, (), 0)


def test_pruning_after_training_is_one_event_without_fading() -> None:
    s = schedule(pruning_time="after", distillation="none", mask_window=200)
    assert (s.start, s.events, s.window, s.mask_step) == (800, (1000,), 0, 1.0)
    assert s.sparsity(0) == 0.6 and s.tuning_share(0) == 1.0
    assert not any(s.in_window(step) is not None for step in range(1001))
    assert schedule(50, pruning_time="after", distillation="none").start == 0


@pytest.mark.parametrize("window", [0, 0.3, 0.999])
def test_pruning_after_training_observes_at_least_one_step(window: float) -> None:
    """Scores come from steps between start and the event; a window below 1 is a fraction of all steps."""
    s = schedule(pruning_time="after", distillation="none", mask_window=window)
    assert s.start < s.end == 1000
    if window:
        assert s.start == 1000 - round(1000 * window)


@pytest.mark.parametrize("number", [1, 2, 5, 16])
@pytest.mark.parametrize("target", [0.1, 0.6, 0.95])
def test_cubic_sparsity(number: int, target: float) -> None:
    """Retained share ρ_T + (1 − ρ_T)·((t_e − e_j) / (t_e − t_s))³."""
    s = schedule(pruning_start=100, pruning_end=100 + 16 * number, num_pruning_events=number, target_sparsity=target)
    for j, event in enumerate(s.events):
        rest = (s.end - event) / (s.end - s.start)
        assert 1 - s.sparsity(j) == pytest.approx((1 - target) + target * rest**3, rel=1e-12)
    values = [s.sparsity(j) for j in range(number)]
    assert values == sorted(values) and values[-1] == target  # exactly


def test_linear_sparsity_and_tuning_share() -> None:
    s = schedule(sparsity_schedule="linear", num_pruning_events=4, target_sparsity=0.8)
    assert [s.sparsity(j) for j in range(4)] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert s.sparsity(3) == 0.8
    assert [s.tuning_share(j) for j in range(4)] == [0.25, 0.5, 0.75, 1.0]


@pytest.mark.parametrize("total", [10, 97, 1000, 12_345])
def test_fractions_are_steps_of_the_run(total: int) -> None:
    fractions = {"pruning_start": 0.1, "pruning_end": 0.9, "mask_window": 0.07}
    fractions |= {"distillation_start": 0.2, "distillation_end": 0.95}
    steps = {key: round(value * total) for key, value in fractions.items()}
    steps["pruning_start"], steps["mask_window"] = max(1, steps["pruning_start"]), max(1, steps["mask_window"])
    assert schedule(total, **fractions) == schedule(total, **steps)


def test_nothing_is_pruned_without_a_target() -> None:
    s = schedule(target_sparsity=None)
    assert (s.events, s.end, s.window) == ((), 0, 0)
    assert (s.distillation_start, s.distillation_end) == (0, 0) and s.mu(10) == 0
    assert s.next_event(0) is None and s.in_window(0) is None and s.event_at(0) is None


@pytest.mark.parametrize("total", [7, 30, 101, 1000])
@pytest.mark.parametrize("number", [1, 2, 3, 5, 6])
@pytest.mark.parametrize(("start", "end"), [(0, 0.999), (0.1, 0.9), (0.5, 0.999)])
def test_events_of_many_runs(total: int, number: int, start: float, end: float) -> None:
    first, last = round(start * total), round(end * total)
    settings = {"pruning_start": start, "pruning_end": end, "num_pruning_events": number, "distillation": "none"}
    if last <= first:
        with pytest.raises(UserError):
            schedule(total, **settings)
        return
    s = schedule(total, **settings)
    number = min(number, last - first)
    assert len(s.events) == number and s.events[-1] == s.end == last and s.start == first
    bounds = (s.start, *s.events)
    gaps = [b - a for a, b in zip(bounds, s.events, strict=False)]
    assert min(gaps) >= 1 and max(gaps) - min(gaps) <= 1
    assert s.window <= min(gaps) and s.mask_step * s.window >= 2 - 1e-9 and s.mask_step >= 0.01
    for step in range(total + 1):
        event, following = s.event_at(step), s.next_event(step)
        assert (event is not None) == (step in s.events)
        assert following == next((j for j, at in enumerate(s.events) if at > step), None)
        inside = [j for j, at in enumerate(s.events) if at - s.window <= step < at]
        assert len(inside) <= 1 and s.in_window(step) == (inside[0] if inside else None)


def test_windows_by_hand() -> None:
    s = schedule(pruning_start=100, pruning_end=300, num_pruning_events=2, mask_window=30)
    assert s.events == (200, 300) and s.window == 30 and s.mask_step == pytest.approx(2 / 30)
    assert [s.window_start(j) for j in (0, 1)] == [170, 270]
    assert [s.in_window(step) for step in (99, 169, 170, 199, 200, 269, 270, 299, 300)] == [
        None, None, 0, 0, None, None, 1, 1, None
    ]  # fmt: skip


def test_a_window_is_at_most_the_interval() -> None:
    s = schedule(pruning_start=100, pruning_end=131, num_pruning_events=3, mask_window=200)
    assert s.events == (110, 121, 131) and s.window == 10
    assert s.window_start(0) == 100 and s.window_start(1) == 111


def test_mask_step_is_raised_for_short_windows_only() -> None:
    settings = {"pruning_start": 0, "pruning_end": 1000, "num_pruning_events": 1, "distillation": "none"}
    assert schedule(1000, mask_window=500, **settings).mask_step == 0.01
    assert schedule(1000, mask_window=100, **settings).mask_step == 0.02
    assert schedule(1000, mask_window=500, mask_step=0.5, **settings).mask_step == 0.5


def test_a_window_of_0_cuts_without_fading() -> None:
    s = schedule(mask_window=0)
    assert s.window == 0 and s.mask_step == 1.0 and all(s.in_window(step) is None for step in range(1000))


# ---------------------------------------------------------------------- distillation


def test_mu_rises_linearly_to_the_end_of_pruning_and_stays() -> None:
    s = schedule(distillation_start=100, pruning_start=100, pruning_end=300, distillation_end=600)
    assert s.mu(99) == 0 and s.mu(100) == pytest.approx(1 / 200) and s.mu(199) == pytest.approx(0.5)
    assert s.mu(299) == s.mu(300) == s.mu(599) == 1.0 and s.mu(600) == 0
    steps = [s.mu(step + 1) - s.mu(step) for step in range(100, 299)]
    assert steps == pytest.approx([1 / 200] * 199)
    assert [step for step in range(1000) if s.distils(step)] == list(range(100, 600))


def test_mu_is_at_most_the_distillation_weight() -> None:
    s = schedule(distillation_weight=0.3)
    assert s.mu(199) == pytest.approx(0.15) and s.mu(500) == pytest.approx(0.3)
    assert max(s.mu(step) for step in range(1000)) == pytest.approx(0.3)


def test_distillation_that_starts_after_pruning_has_its_full_weight() -> None:
    s = schedule(distillation_start=400)
    assert s.mu(399) == 0 and s.mu(400) == 1.0


def test_a_model_as_teacher_needs_no_pruning() -> None:
    s = schedule(target_sparsity=None, distillation="model", teacher_name_or_path="t")
    assert (s.distillation_start, s.distillation_end) == (0, 600) and s.mu(0) == s.mu(599) == 1.0 and s.mu(600) == 0


def test_no_distillation() -> None:
    s = schedule(distillation="none")
    assert (s.distillation_start, s.distillation_end) == (0, 0) and not any(s.distils(step) for step in range(1000))


# ---------------------------------------------------------------------- errors


@pytest.mark.parametrize("total", [0, -3])
def test_a_run_without_steps(total: int) -> None:
    with pytest.raises(UserError, match=f"has {total} steps. Raise num_train_epochs or max_steps"):
        schedule(total)


def test_pruning_that_ends_before_it_starts() -> None:
    with pytest.raises(UserError, match="begin at step 400 and end at step 300 of 1000.*pruning_start below"):
        schedule(pruning_start=400)


def test_pruning_end_after_the_last_step() -> None:
    with pytest.raises(UserError, match="pruning_end=1200 lies after the last step 1000. Lower pruning_end"):
        schedule(pruning_end=1200)
    assert schedule(pruning_end=1000, distillation="none").end == 1000


def test_self_distillation_of_a_model_pruned_before_training_is_refused() -> None:
    with pytest.raises(UserError, match="pruning_time: before.*Use distillation: none, or distillation: model"):
        schedule(pruning_time="before")


def test_self_distillation_after_training_is_refused() -> None:
    with pytest.raises(UserError, match="pruning_time: after.*Use distillation: none"):
        schedule(pruning_time="after")


@pytest.mark.parametrize(
    ("settings", "first", "last"),
    [
        ({"distillation_start": 700}, 700, 600),
        ({"distillation_end": 100}, 100, 100),
        ({"distillation_end": 1500}, 100, 1500),
        ({"distillation_start": 0.5, "distillation_end": 0.4}, 500, 400),
    ],
)
def test_impossible_distillation_interval_names_its_steps(settings: dict[str, float], first: int, last: int) -> None:
    with pytest.raises(UserError) as error:
        schedule(**settings)
    text = str(error.value)
    assert f"from step {first} to {last} of 1000" in text
    assert "Set distillation_start below distillation_end, or use distillation: none" in text


def test_every_run_fades_its_masks_within_half_a_window() -> None:
    for total in (60, 333, 5000):
        s = schedule(total)
        assert math.ceil(1 / s.mask_step) <= math.ceil(s.window / 2) or s.mask_step == 0.01


def test_every_fourth_step_is_observed_between_start_and_last_event() -> None:
    found = schedule(1000, pruning_start=100, pruning_end=300)
    assert found.observe_every == 4
    assert [step for step in range(95, 310) if found.observes(step)] == list(range(100, 300, 4))


@pytest.mark.parametrize(
    ("asked", "end", "every"),
    [(1, 300, 1), (4, 300, 4), (10, 300, 5), (4, 180, 2), (4, 140, 1)],
    ids=["asked for each", "default", "at least eight per event", "short", "shortest"],
)
def test_each_event_rests_on_eight_observations(asked: int, end: int, every: int) -> None:
    found = schedule(1000, pruning_start=100, pruning_end=end, observe_every=asked)
    assert found.observe_every == every
    for before, after in zip((100, *found.events), found.events, strict=False):
        observed = sum(found.observes(step) for step in range(before, after))
        assert observed >= min(8, after - before)


def test_nothing_is_observed_where_nothing_is_pruned() -> None:
    assert not any(schedule(50, target_sparsity=None).observes(step) for step in range(50))
