"""Distances between student and teacher: predictions (KL or squared error), embeddings (cosine) and hidden states
(squared error).

Computed in float32, over real tokens only. Not for weighing the losses against the task loss, nor for choosing which
layers meet. Source: APT, Sec. 4.4, where padding was counted in.

Shapes: B examples, S tokens, V classes, C labels, d_s and d_t hidden sizes of student and teacher.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch.nn import functional as F
from transformers.utils import ModelOutput

from apt_trainer.models import Stack
from apt_trainer.models.labels import MULTI_LABEL, REGRESSION

Transform = Callable[[torch.Tensor], torch.Tensor]

_RMS_EPSILON = 1e-6


def prediction_loss(
    student_output: ModelOutput,
    teacher_output: ModelOutput,
    temperature: float,
    mask: torch.Tensor | None = None,
    problem: str | None = None,
) -> torch.Tensor:
    """How far the student's predictions are from the teacher's; scalar float32.

    ``mask`` [B, S] is 1 at real tokens; None counts all. ``problem``: what ``logits`` [B, C] mean, a ``problem_type``
    of transformers; None: regression where C is 1, else one label per row. By what the outputs hold:

    * ``logits`` [B, C] of one label: τ²·KL(teacher ‖ student), mean over examples;
    * ``logits`` [B, C] of several labels: τ²·KL between the Bernoulli distributions of each label, σ(logit/τ), sum
      over labels, mean over examples;
    * ``logits`` [B, C] of a regression: mean squared error over examples and numbers, without temperature;
    * ``logits`` [B, S, V]: τ²·KL per token, mean over real tokens; where one of the two has more words, which only
      pad its vocabulary, over those of both;
    * ``start_logits`` and ``end_logits`` [B, S]: τ²·KL over real positions, mean over examples and the two.
    """
    if "start_logits" in student_output:
        parts = [
            token_divergence(_hide(student_output[name], mask), _hide(teacher_output[name], mask), temperature).mean()
            for name in ("start_logits", "end_logits")
        ]
        return torch.stack(parts).mean()
    student, teacher = student_output["logits"].float(), teacher_output["logits"].float()
    if problem is None and student.dim() == 2 and student.shape[1] == 1:
        problem = REGRESSION
    if problem == REGRESSION:
        return F.mse_loss(student, teacher)
    if student.dim() == 3:
        words = min(student.shape[-1], teacher.shape[-1])
        student, teacher = student[..., :words], teacher[..., :words]
    divergence = (_bernoulli_kl if problem == MULTI_LABEL else token_divergence)(student, teacher, temperature)
    if divergence.dim() == 1 or mask is None:
        return divergence.mean()
    real = mask.to(divergence.dtype)
    return (divergence * real).sum() / real.sum().clamp(min=1)


def token_divergence(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """τ²·KL(softmax(teacher/τ) ‖ softmax(student/τ)) over the last dimension, of float32 logits [..., V]."""
    student_log, teacher_log = (F.log_softmax(x / temperature, dim=-1) for x in (student, teacher))
    return temperature**2 * F.kl_div(student_log, teacher_log, reduction="none", log_target=True).sum(-1)


def _bernoulli_kl(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """τ²·Σ KL(Bernoulli(σ(teacher/τ)) ‖ Bernoulli(σ(student/τ))) over the last dimension."""
    student, teacher = student / temperature, teacher / temperature
    present = torch.sigmoid(teacher) * (F.logsigmoid(teacher) - F.logsigmoid(student))
    absent = torch.sigmoid(-teacher) * (F.logsigmoid(-teacher) - F.logsigmoid(-student))
    return temperature**2 * (present + absent).sum(-1)


def _hide(logits: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Positions [B, S] outside ``mask`` get no probability; finite, because 0·(inf − inf) is not 0."""
    logits = logits.float()
    return logits if mask is None else logits.masked_fill(mask == 0, torch.finfo(torch.float32).min / 1e4)


def embedding_loss(student: torch.Tensor, teacher: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Mean of 1 − cos(student, teacher) over the last dimension of two [..., d]; scalar float32.

    The mean runs over all that the other dimensions count, or where ``mask`` [...] is 1.
    """
    apart = 1.0 - F.cosine_similarity(student.float(), teacher.float(), dim=-1)
    if mask is None:
        return apart.mean()
    return apart.masked_fill(mask == 0, 0.0).sum() / mask.sum().clamp(min=1)


def layer_outputs(output: ModelOutput, stack: Stack = "encoder") -> tuple[torch.Tensor, ...]:
    """Hidden states [B, S, d] after each layer: ``hidden_states`` without its first entry, the embeddings.

    ``stack``: whose, where the output tells those of an encoder and of a decoder apart.
    """
    key = f"{stack}_hidden_states"
    return tuple(output[key if key in output else "hidden_states"][1:])


def hidden_distance(
    student: torch.Tensor,
    teacher: torch.Tensor,
    transform: Transform,
    mask: torch.Tensor | None = None,
    normalise: bool = False,
) -> torch.Tensor:
    """Mean squared difference of ``transform(student)`` [B, S, d_t] and ``teacher`` [B, S, d_t]; scalar float32.

    The mean runs over the tokens where ``mask`` [B, S] is 1, and over d_t. ``normalise`` divides both by their
    root mean square over d_t first (APT for T5 and LLaMA, whose hidden states have no fixed scale).
    """
    moved, goal = transform(student.float()).float(), teacher.float()
    if normalise:
        moved, goal = _unit_rms(moved), _unit_rms(goal)
    difference = moved - goal
    if mask is None:
        return difference.square().mean()
    # Masked before squaring: even a NaN at a padded position then has gradient 0.
    difference = difference.masked_fill((mask == 0).unsqueeze(-1), 0.0)
    return difference.square().sum() / (mask.sum().clamp(min=1) * goal.shape[-1])


def _unit_rms(hidden: torch.Tensor) -> torch.Tensor:
    return hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + _RMS_EPSILON)


def layer_loss(
    student_hidden: Sequence[torch.Tensor],
    teacher_hidden: Sequence[torch.Tensor],
    pairs: Sequence[tuple[int, int]],
    transform: Transform,
    mask: torch.Tensor | None = None,
    normalise: bool = False,
) -> torch.Tensor:
    """Sum of :func:`hidden_distance` over ``pairs`` of (student layer, teacher layer); scalar float32.

    ``student_hidden`` [layer][B, S, d_s] and ``teacher_hidden`` [layer][B, S, d_t] are as :func:`layer_outputs`
    gives them. 0 without pairs.
    """
    distances = [hidden_distance(student_hidden[s], teacher_hidden[t], transform, mask, normalise) for s, t in pairs]
    if not distances:
        return student_hidden[0].new_zeros((), dtype=torch.float32)
    return torch.stack(distances).sum()
