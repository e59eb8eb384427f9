"""Brings hidden states of a student that lost hidden dimensions back to the width of its teacher.

A surviving dimension lands where the teacher has it; a trainable low-rank part, zero at first, adds to that. Not a
part of the model: it is dropped with the teacher. Source: APT, Sec. 4.4, where the fixed part was a d×d matrix.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from apt_trainer.errors import UserError
from apt_trainer.tensors.partitioned import parameter_like, shape_of, whole


class HiddenTransform(nn.Module):
    """Hidden states [B, S, d_s] of the student → [B, S, d_t]: scatter to ``hidden_index`` + scaling·B·A.

    Args:
        num_student: d_s, the student's hidden dimensions.
        num_teacher: d_t, the teacher's.
        rank: r of the trainable part; 0: only the scatter, no parameters.
        scaling: factor of the low-rank part, constant while the rank grows.
        hidden_index: [d_s] increasing positions of the student's dimensions in the teacher. None: identity where the
            sizes are equal; otherwise there is no fixed part and the low-rank part learns the whole map.
        generator: for the initial A; default: torch's global one.

    ``lora_A`` [r, d_s] starts uniform in ±1/√d_s and ``lora_B`` [d_t, r] at 0. Raises :class:`UserError` where the
    sizes differ and there is neither an index nor a rank. The methods that change a shape put new parameters in place
    and return what happened to each, so that optimizer state can follow.
    """

    hidden_index: torch.Tensor | None
    lora_A: nn.Parameter | None
    lora_B: nn.Parameter | None

    def __init__(
        self,
        num_student: int,
        num_teacher: int,
        rank: int = 8,
        scaling: float = 2.0,
        hidden_index: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if hidden_index is None and num_student == num_teacher:
            hidden_index = torch.arange(num_student)
        if hidden_index is None and rank == 0:
            raise UserError(
                f"The teacher has {num_teacher} hidden dimensions and the student {num_student}, so their layers "
                "cannot be compared by identity. Leave distillation_transform at lora, or set layer_weight: 0."
            )
        if hidden_index is not None:
            assert len(hidden_index) == num_student and int(hidden_index[-1]) < num_teacher
            assert bool((hidden_index.diff() > 0).all()), "hidden_index must increase"
        self.num_student, self.num_teacher, self.scaling = num_student, num_teacher, scaling
        self.register_buffer("hidden_index", hidden_index)
        self.register_parameter("lora_A", None)
        self.register_parameter("lora_B", None)
        if rank > 0:
            self.grow(rank, generator)

    @property
    def rank(self) -> int:
        return 0 if self.lora_A is None else int(shape_of(self.lora_A)[0])

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[B, S, d_s] → [B, S, d_t]."""
        moved = self._scatter(hidden)
        if self.lora_A is None or self.lora_B is None:
            assert moved is not None
            return moved
        low_rank = self.scaling * F.linear(F.linear(hidden.to(self.lora_A.dtype), self.lora_A), self.lora_B)
        return low_rank if moved is None else moved + low_rank

    def _scatter(self, hidden: torch.Tensor) -> torch.Tensor | None:
        if self.hidden_index is None:
            return None
        if self.num_student == self.num_teacher:  # increasing and complete: the identity
            return hidden
        wide = hidden.new_zeros(*hidden.shape[:-1], self.num_teacher)
        return wide.index_copy(-1, self.hidden_index, hidden)

    @torch.no_grad()
    def cut_inputs(self, index: torch.Tensor) -> list[tuple[str, int, torch.Tensor]]:
        """The student kept only its hidden dimensions ``index`` [d_s'], increasing.

        Returns (parameter, dim, kept index) per parameter that was cut.
        """
        if self.hidden_index is not None:
            self.hidden_index = self.hidden_index[index.to(self.hidden_index.device)]
        self.num_student = len(index)
        if self.lora_A is None:
            return []
        self.lora_A = _kept(self.lora_A, 1, index)
        return [("lora_A", 1, index)]

    @torch.no_grad()
    def retarget(self) -> list[tuple[str, int, torch.Tensor]]:
        """The teacher became a new snapshot of this student: its dimensions are the student's now.

        What the low-rank part adds to each surviving dimension stays. Returns edits as :meth:`cut_inputs`.
        """
        assert self.hidden_index is not None, "only a snapshot of the student can be retargeted"
        index, self.hidden_index = self.hidden_index, torch.arange(self.num_student, device=self.hidden_index.device)
        self.num_teacher = self.num_student
        if self.lora_B is None:
            return []
        self.lora_B = _kept(self.lora_B, 0, index)
        return [("lora_B", 0, index)]

    @torch.no_grad()
    def grow(self, extra: int, generator: torch.Generator | None = None) -> list[tuple[str, int, int]]:
        """Append ``extra`` ranks: random rows of A, zero columns of B, so that the output does not change.

        ``generator`` is one of the CPU. Returns (parameter, dim, extra) per parameter that grew.
        """
        rows = torch.empty(extra, self.num_student)
        nn.init.kaiming_uniform_(rows, a=5**0.5, generator=generator)
        columns = torch.zeros(self.num_teacher, extra)
        if self.lora_A is None or self.lora_B is None:
            device = None if self.hidden_index is None else self.hidden_index.device
            self.lora_A, self.lora_B = nn.Parameter(rows.to(device)), nn.Parameter(columns.to(device))
        else:
            self.lora_A = _extended(self.lora_A, 0, rows)
            self.lora_B = _extended(self.lora_B, 1, columns)
        return [("lora_A", 0, extra), ("lora_B", 1, extra)]


def _kept(old: nn.Parameter, dim: int, index: torch.Tensor) -> nn.Parameter:
    with whole(old) as (value,):
        kept = value.index_select(dim, index.to(old.device))
    return parameter_like(old, kept)


def _extended(old: nn.Parameter, dim: int, new: torch.Tensor) -> nn.Parameter:
    with whole(old) as (value,):
        extended = torch.cat([value, new.to(value)], dim)
    return parameter_like(old, extended)
