"""Pure functions of the step: when units go, how many, how fast masks fade, how much the teacher counts.

Steps are completed optimizer steps: an event at step t happens after the t-th update. Knows neither model nor Trainer.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from apt_trainer.errors import UserError
from apt_trainer.settings import MethodSettings

_WINDOWS = {"before": (0.0, 0.3), "early": (0.1, 0.3), "late": (0.5, 0.75), "after": (1.0, 1.0)}
_DEFAULT_DISTILLATION_END = 0.6
_LEAST_OBSERVATIONS = 8


@dataclass(frozen=True)
class Schedule:
    """Everything that depends on the step, resolved for a run of ``total`` steps. Build with :func:`make_schedule`.

    ``before``: the target is met before the first step, and at ``events`` only ranks grow.
    """

    total: int
    start: int
    events: tuple[int, ...]
    window: int
    mask_step: float
    target_sparsity: float
    cubic: bool
    distillation_start: int
    distillation_end: int
    distillation_weight: float
    observe_every: int = 1
    before: bool = False

    @property
    def end(self) -> int:
        """Step of the last event, when target sparsity and ranks are reached; 0 when nothing is pruned."""
        return self.events[-1] if self.events else 0

    def meets_budget(self, step: int) -> bool:
        """Whether after ``step`` completed steps nothing is left to remove, and so nothing is masked."""
        return self.before or step >= self.end

    def sparsity(self, event: int, start: float = 0.0) -> float:
        """Target after event number ``event`` (0-based): s_0 + (s_T − s_0)·(1 − (1 − j/n)³) (APT, App. C).

        ``start``: s_0, the sparsity of a model that was pruned before.
        """
        if self.before:
            return self.target_sparsity
        progress = (event + 1) / len(self.events)
        share = 1 - (1 - progress) ** (3 if self.cubic else 1)
        return start + (self.target_sparsity - start) * share

    def tuning_share(self, event: int) -> float:
        """Share in (0, 1] of the growth of adapter parameters that is reached at ``event`` (0-based); linear."""
        return (event + 1) / len(self.events)

    def event_at(self, step: int) -> int | None:
        """Number of the event that happens after ``step``, if any."""
        return self.events.index(step) if step in self.events else None

    def next_event(self, step: int) -> int | None:
        """Number of the first event later than ``step`` completed steps."""
        return next((number for number, at in enumerate(self.events) if at > step), None)

    def window_start(self, event: int) -> int:
        """First completed step at which masks of ``event`` may move."""
        previous = self.events[event - 1] if event else self.start
        return max(previous, self.events[event] - self.window)

    def observes(self, step: int) -> bool:
        """Whether scores are observed in step ``step`` + 1: from the start of pruning to its last event."""
        begun = step >= self.start and self.next_event(step) is not None
        return begun and (step - self.start) % self.observe_every == 0

    def in_window(self, step: int) -> int | None:
        """Number of the event whose masks fade while step ``step`` + 1 is computed, if any."""
        event = self.next_event(step)
        if event is None or self.window == 0 or step < self.window_start(event):
            return None
        return event

    def distils(self, step: int) -> bool:
        """Whether a distillation loss is used after ``step`` completed steps."""
        return self.distillation_start <= step < self.distillation_end

    def mu(self, step: int) -> float:
        """Weight of distillation against the task; rises linearly until pruning ends (APT, Sec. 4.4)."""
        if not self.distils(step):
            return 0.0
        ramp = self.end - self.distillation_start
        share = min(1.0, (step + 1 - self.distillation_start) / ramp) if ramp > 0 else 1.0
        return self.distillation_weight * share


def make_schedule(settings: MethodSettings, total: int) -> Schedule:
    """Resolve fractions and defaults for ``total`` steps; raises :class:`UserError` if the run is too short."""
    if total < 1:
        raise UserError(f"The run has {total} steps. Raise num_train_epochs or max_steps.")
    start, events, window = _pruning_steps(settings, total)
    distillation_start, distillation_end = _distillation_steps(settings, total, start, events)
    return Schedule(
        total=total,
        start=start,
        events=events,
        window=window,
        mask_step=max(settings.mask_step, 2.0 / window if window else 1.0),
        target_sparsity=settings.target_sparsity or 0.0,
        cubic=settings.sparsity_schedule == "cubic",
        distillation_start=distillation_start,
        distillation_end=distillation_end,
        distillation_weight=settings.distillation_weight,
        observe_every=_observation_interval(settings, start, events),
        before=settings.prunes_before,
    )


def fewer_events(settings: MethodSettings, schedule: Schedule) -> str | None:
    """What to tell the user where not all events that were asked for have a step of their own; else None."""
    number, asked = len(schedule.events), settings.num_pruning_events
    if not 0 < number < asked or settings.pruning_time == "after":
        return None
    return (
        f"num_pruning_events={asked} do not fit between step {schedule.start} and {schedule.end} of "
        f"{schedule.total}: there will be {number}."
    )


def _steps(value: float, total: int) -> int:
    """A float up to 1.0 is a fraction of ``total``, anything else a number of steps."""
    return round(value * total) if isinstance(value, float) and value <= 1 else int(value)


def _pruning_steps(settings: MethodSettings, total: int) -> tuple[int, tuple[int, ...], int]:
    """(start, events, mask window)"""
    if not settings.prunes:
        return 0, (), 0
    default_start, default_end = _WINDOWS[settings.pruning_time]
    if settings.pruning_time == "after":
        return max(0, total - max(1, _steps(settings.mask_window, total))), (total,), 0
    start = _steps(default_start if settings.pruning_start is None else settings.pruning_start, total)
    end = _steps(default_end if settings.pruning_end is None else settings.pruning_end, total)
    if settings.pruning_start is None and settings.pruning_end is None:
        end = max(end, start + 1)  # in a run of a few steps both round to the same
    if end > total:
        raise UserError(f"pruning_end={end} lies after the last step {total}. Lower pruning_end, or train longer.")
    if end <= start:
        raise UserError(
            f"Pruning would begin at step {start} and end at step {end} of {total}, which leaves no step to score "
            "units in. Set pruning_start below pruning_end, or train longer."
        )
    number = min(settings.num_pruning_events, end - start)
    events = tuple(start + round((end - start) * (j + 1) / number) for j in range(number))
    if settings.prunes_before:
        return start, events, 0
    interval = (end - start) // number
    return start, events, min(interval, _steps(settings.mask_window, total))


def _observation_interval(settings: MethodSettings, start: int, events: tuple[int, ...]) -> int:
    """Steps between observations: as set, but so that each event rests on eight or more."""
    steps = min((after - before for before, after in pairwise((start, *events))), default=1)
    return max(1, min(settings.observe_every, steps // _LEAST_OBSERVATIONS))


def _distillation_steps(settings: MethodSettings, total: int, start: int, events: tuple[int, ...]) -> tuple[int, int]:
    if settings.distillation == "none" or (settings.distillation == "self" and not events):
        return 0, 0
    if settings.prunes_before and settings.distillation == "self":
        raise UserError(
            "pruning_time: before removes units before the first step, when there is no trained student to distil "
            "from. Use distillation: none, or distillation: model with teacher_name_or_path."
        )
    first = start if settings.distillation_start is None else _steps(settings.distillation_start, total)
    last_event = events[-1] if events else 0
    default_end = max(_steps(_DEFAULT_DISTILLATION_END, total), last_event)
    last = default_end if settings.distillation_end is None else _steps(settings.distillation_end, total)
    if settings.pruning_time == "after" and settings.distillation == "self":
        raise UserError(
            "pruning_time: after removes units when training has ended, so nothing is left to distil. "
            "Use distillation: none."
        )
    if not first < last <= total:
        raise UserError(
            f"Distillation would run from step {first} to {last} of {total}. "
            "Set distillation_start below distillation_end, or use distillation: none."
        )
    return first, last
