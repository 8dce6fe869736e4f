"""Cross-entropy and forward KL with their gradient in closed form, written over the logits.

p is the teacher, q the student, T the temperature; sums are in fp32 at least. On a GPU for which triton
compiles, a chunk is one kernel's work (`closed_form_triton`); elsewhere it goes through tiles of a few rows
that stay in cache. For one tile x = (z - max z) / T, of the logits z; "pull" is what q is multiplied by in
the divergence's gradient at the ids that the teacher says nothing of: d KL / d(z / T) = pull q there.

Shapes: C tokens of one chunk, R tokens of one tile, V vocabulary, K the teacher's kept ids.
"""

import importlib.util
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from potstill.losses.divergences import renormalised, require_comparable
from potstill.losses.head import TokenFunction, at_least_fp32
from potstill.losses.types import Dense, Sampled, Sparse, TeacherSignal

__all__ = ["ClosedForm", "tile_parts"]

# A tile's bytes: what stays in a core's cache; a GPU needs work enough for each of its launches.
_TILE_BYTES = {"cpu": 4 << 20, "cuda": 64 << 20}
_LARGEST_TILE = 128


@dataclass(frozen=True)
class ClosedForm:
    """`values`, whose "loss" is (1 - alpha) CE + alpha T^2 scale KL(p || q), with that loss's gradient.

    Without a teacher the loss is CE. `renormalise` makes a sparse teacher `renormalised`.
    """

    values: TokenFunction
    targets_N: Tensor
    teacher: TeacherSignal | None = None
    alpha: float = 0.0
    temperature: float = 1.0
    divergence_scale: float = 1.0
    renormalise: bool = False
    tile_rows: int | None = None

    def __call__(self, logits_CV: Tensor, rows: slice) -> dict[str, Tensor]:
        """The quantities by plain operations."""
        return self.values(logits_CV, rows)

    @torch.no_grad()
    def overwrite(self, logits_CV: Tensor, rows: slice, weights_C: Tensor | None) -> dict[str, Tensor]:
        """The same quantities; the logits, of any type, become d(sum_n weights_n loss_n) / d logits."""
        kept = None if self.teacher is None else self.teacher.rows(rows)
        signal = renormalised(kept) if self.renormalise and isinstance(kept, Sparse) else kept
        if signal is not None:
            require_comparable(logits_CV, signal, self.temperature)
        whole = self._by_kernel if _has_kernel(logits_CV) else self._by_tiles
        quantities = whole(logits_CV, self.targets_N[rows], signal, weights_C)
        if isinstance(kept, Sparse):
            quantities["teacher_tail"] = kept.log_tail_N.exp()
        return quantities

    def _by_kernel(
        self,
        logits_CV: Tensor,
        targets_C: Tensor,
        signal: Dense | Sparse | Sampled | None,
        weights_C: Tensor | None,
    ) -> dict[str, Tensor]:
        from potstill.losses import closed_form_triton

        temperature = 1.0 if signal is None else self.temperature
        weights = None if weights_C is None else self._weights(weights_C.to(at_least_fp32(logits_CV.dtype)))
        cross_entropy_C, kl_C, agreed_C = closed_form_triton.overwrite(
            logits_CV, targets_C, signal, temperature, weights
        )
        return self._quantities(cross_entropy_C, *((None, None) if signal is None else (kl_C, agreed_C)))

    def _by_tiles(
        self,
        logits_CV: Tensor,
        targets_C: Tensor,
        signal: Dense | Sparse | Sampled | None,
        weights_C: Tensor | None,
    ) -> dict[str, Tensor]:
        tile_rows = self.tile_rows or _tile_rows(logits_CV)
        scratch = _Scratch(min(tile_rows, len(logits_CV)), logits_CV)
        tiles = [
            self._tile(
                logits_CV[part],
                targets_C[part],
                None if signal is None else signal.rows(part),
                None if weights_C is None else weights_C[part],
                scratch,
            )
            for part in tile_parts(logits_CV, tile_rows)
        ]
        return {name: torch.cat([tile[name] for tile in tiles]) for name in tiles[0]}

    def _quantities(
        self, cross_entropy_R: Tensor, kl_R: Tensor | None, agreed_R: Tensor | None
    ) -> dict[str, Tensor]:
        quantities = {"loss": (1 - self.alpha) * cross_entropy_R, "cross_entropy": cross_entropy_R}
        if kl_R is not None and agreed_R is not None:
            quantities["loss"] = quantities["loss"] + self._kl_scale * kl_R
            quantities |= {"kl": kl_R, "agreement": agreed_R}
        return quantities

    @property
    def _kl_scale(self) -> float:
        return self.alpha * self.temperature**2 * self.divergence_scale

    def _weights(self, weights_R: Tensor) -> tuple[Tensor, Tensor]:
        """What d CE / d z and d KL / d (z / T) are multiplied by."""
        return (1 - self.alpha) * weights_R, self._kl_scale / self.temperature * weights_R

    def _tile(
        self,
        logits_RV: Tensor,
        targets_R: Tensor,
        signal: Dense | Sparse | Sampled | None,
        weights_R: Tensor | None,
        scratch: "_Scratch",
    ) -> dict[str, Tensor]:
        temperature = 1.0 if signal is None else self.temperature
        z_RV = scratch.full_precision(logits_RV)
        high_R1 = z_RV.amax(-1, keepdim=True)
        agreed_R = None if signal is None else (z_RV.gather(-1, signal.top_ids[:, None]) >= high_R1)[:, 0]
        x_RV = torch.add(-high_R1 / temperature, z_RV, alpha=1 / temperature, out=z_RV)
        target_x_R1 = x_RV.gather(-1, targets_R[:, None])
        teacher = self._teacher(signal, x_RV, scratch)

        # From here on the tile holds exp(x), and `plain_RV` exp(T x), which CE needs.
        tempered_RV, plain_RV = _exponentials(x_RV, temperature, scratch)
        rest_R1 = tempered_RV.sum(-1, keepdim=True)
        plain_R1 = rest_R1 if plain_RV is tempered_RV else plain_RV.sum(-1, keepdim=True)
        tempered_R1, plain_R1 = rest_R1 + teacher.removed(1.0), plain_R1 + teacher.removed(temperature)
        cross_entropy_R = (plain_R1.log() - temperature * target_x_R1)[:, 0]
        kl_R1, pull_R1 = teacher.compare(rest_R1, tempered_R1)
        quantities = self._quantities(
            cross_entropy_R, *((None, None) if agreed_R is None else (kl_R1[:, 0], agreed_R.to(kl_R1.dtype)))
        )
        if weights_R is None:
            return quantities

        of_target_R1, of_teacher_R1 = self._weights(weights_R.to(x_RV.dtype)[:, None])
        plain_share_R1, tempered_share_R1 = of_target_R1 / plain_R1, of_teacher_R1 * pull_R1 / tempered_R1
        if plain_RV is tempered_RV:
            tempered_RV.mul_(plain_share_R1 + tempered_share_R1)
        else:
            tempered_RV.mul_(tempered_share_R1).add_(plain_RV.mul_(plain_share_R1))
        teacher.correct(tempered_RV, of_teacher_R1, plain_share_R1)
        tempered_RV.scatter_add_(-1, targets_R[:, None], -of_target_R1)
        if tempered_RV.dtype != logits_RV.dtype:
            logits_RV.copy_(tempered_RV)
        return quantities

    def _teacher(
        self, signal: Dense | Sparse | Sampled | None, x_RV: Tensor, scratch: "_Scratch"
    ) -> "_Teacher":
        if isinstance(signal, Sparse):
            return _SparseTeacher(signal, x_RV, self.temperature)
        if isinstance(signal, Sampled):
            return _SampledTeacher(signal, x_RV)
        if isinstance(signal, Dense):
            return _DenseTeacher(signal, x_RV, self.temperature, scratch)
        return _Teacher(x_RV)


class _Teacher:
    """What a tile needs of its teacher; this one, which is none, says nothing of any id."""

    def __init__(self, x_RV: Tensor) -> None:
        self.zeros_R1 = x_RV.new_zeros((len(x_RV), 1))

    def removed(self, power: float) -> Tensor:
        """The sum of exp(power x) over the ids that construction took out of the tile."""
        return self.zeros_R1

    def compare(self, rest_R1: Tensor, total_R1: Tensor) -> tuple[Tensor, Tensor]:
        """KL and pull, from the sums of exp(x) over what is left in the tile and over all ids."""
        return self.zeros_R1, self.zeros_R1

    def correct(self, gradient_RV: Tensor, of_teacher_R1: Tensor, plain_share_R1: Tensor) -> None:
        """Turn the gradient, which has the pull at all ids, into the right one at the teacher's."""


class _DenseTeacher(_Teacher):
    """Every id has its p; the pull is 1 and p is taken off."""

    def __init__(self, signal: Dense, x_RV: Tensor, temperature: float, scratch: "_Scratch") -> None:
        super().__init__(x_RV)
        p_RV, terms_RV = scratch.buffer("teacher", len(x_RV)), scratch.buffer("plain", len(x_RV))
        high_R1 = signal.logits_NV.amax(-1, keepdim=True).to(x_RV.dtype)
        torch.add(-high_R1 / temperature, signal.logits_NV, alpha=1 / temperature, out=p_RV)
        torch.sub(p_RV, x_RV, out=terms_RV)
        p_RV.exp_()
        self.mass_R1 = p_RV.sum(-1, keepdim=True)
        # 0 log 0 = 0, while a NaN among the logits is also in the sums that the KL is made of.
        terms_RV.mul_(p_RV).nan_to_num_(0.0, math.inf, -math.inf)
        self.difference_R1 = terms_RV.sum(-1, keepdim=True) / self.mass_R1
        self.p_RV = p_RV

    def compare(self, rest_R1: Tensor, total_R1: Tensor) -> tuple[Tensor, Tensor]:
        return self.difference_R1 + total_R1.log() - self.mass_R1.log(), torch.ones_like(total_R1)

    def correct(self, gradient_RV: Tensor, of_teacher_R1: Tensor, plain_share_R1: Tensor) -> None:
        gradient_RV.sub_(self.p_RV.mul_(of_teacher_R1 / self.mass_R1))


class _SampledTeacher(_Teacher):
    """A few ids have a share; the pull is their sum and each share is taken off."""

    def __init__(self, signal: Sampled, x_RV: Tensor) -> None:
        super().__init__(x_RV)
        self.ids_RK, self.shares_RK = signal.ids_NK, signal.shares_NK.to(x_RV.dtype)
        self.x_RK = x_RV.gather(-1, self.ids_RK)

    def compare(self, rest_R1: Tensor, total_R1: Tensor) -> tuple[Tensor, Tensor]:
        log_q_RK = self.x_RK - total_R1.log()
        terms_RK = torch.where(self.shares_RK > 0, self.shares_RK * (self.shares_RK.log() - log_q_RK), 0)
        return terms_RK.sum(-1, keepdim=True), self.shares_RK.sum(-1, keepdim=True)

    def correct(self, gradient_RV: Tensor, of_teacher_R1: Tensor, plain_share_R1: Tensor) -> None:
        gradient_RV.scatter_add_(-1, self.ids_RK, -of_teacher_R1 * self.shares_RK)


class _SparseTeacher(_Teacher):
    """The kept ids leave the tile, so that the student's tail is a sum of its own and nothing cancels."""

    def __init__(self, signal: Sparse, x_RV: Tensor, temperature: float) -> None:
        super().__init__(x_RV)
        self.temperature = temperature
        self.ids_RK, self.log_p_RK = signal.ids_NK, signal.log_probs_NK.to(x_RV.dtype)
        self.p_RK, self.tail_R1 = self.log_p_RK.exp(), signal.log_tail_N.to(x_RV.dtype).exp()[:, None]
        self.x_RK = x_RV.gather(-1, self.ids_RK)
        x_RV.scatter_(-1, self.ids_RK, -math.inf)

    def removed(self, power: float) -> Tensor:
        return (power * self.x_RK).exp().sum(-1, keepdim=True)

    def compare(self, rest_R1: Tensor, total_R1: Tensor) -> tuple[Tensor, Tensor]:
        log_q_RK = self.x_RK - total_R1.log()
        kept_R1 = torch.where(self.p_RK > 0, self.p_RK * (self.log_p_RK - log_q_RK), 0).sum(-1, keepdim=True)
        # A tail that is too small for its type counts as the smallest number, a constant.
        smallest = torch.finfo(rest_R1.dtype).tiny
        tail_q_R1 = rest_R1 / total_R1
        counts_R1 = tail_q_R1 > smallest
        ratio_R1 = self.tail_R1 / tail_q_R1.clamp(min=smallest)
        self.q_RK = log_q_RK.exp()
        self.mass_R1 = self.p_RK.sum(-1, keepdim=True) + counts_R1 * self.tail_R1
        return kept_R1 + torch.xlogy(self.tail_R1, ratio_R1), self.mass_R1 - counts_R1 * ratio_R1

    def correct(self, gradient_RV: Tensor, of_teacher_R1: Tensor, plain_share_R1: Tensor) -> None:
        plain_RK = (self.temperature * self.x_RK).exp_().mul_(plain_share_R1)
        gradient_RV.scatter_(
            -1, self.ids_RK, plain_RK + of_teacher_R1 * (self.mass_R1 * self.q_RK - self.p_RK)
        )


class _Scratch:
    """Buffers of one tile, reused by all tiles of a chunk."""

    def __init__(self, tile_rows: int, logits_CV: Tensor) -> None:
        self._shape = (tile_rows, logits_CV.shape[-1])
        self._dtype, self._device = at_least_fp32(logits_CV.dtype), logits_CV.device
        self._buffers: dict[str, Tensor] = {}

    def buffer(self, name: str, rows: int) -> Tensor:
        """The first rows of the buffer of a name."""
        if name not in self._buffers:
            self._buffers[name] = torch.empty(self._shape, dtype=self._dtype, device=self._device)
        return self._buffers[name][:rows]

    def full_precision(self, logits_RV: Tensor) -> Tensor:
        """The logits themselves, or a copy of them in fp32."""
        if logits_RV.dtype == self._dtype:
            return logits_RV
        return self.buffer("logits", len(logits_RV)).copy_(logits_RV)


def _exponentials(x_RV: Tensor, temperature: float, scratch: _Scratch) -> tuple[Tensor, Tensor]:
    """exp(x), in place, and exp(T x): the same tensor at T = 1, the square at T = 2, which is cheaper."""
    if temperature == 1:
        x_RV.exp_()
        return x_RV, x_RV
    plain_RV = scratch.buffer("plain", len(x_RV))
    if temperature == 2:
        return x_RV.exp_(), torch.mul(x_RV, x_RV, out=plain_RV)
    torch.mul(x_RV, temperature, out=plain_RV).exp_()
    return x_RV.exp_(), plain_RV


def _has_kernel(logits_CV: Tensor) -> bool:
    return logits_CV.is_cuda and logits_CV.stride(-1) == 1 and _triton_compiles()


@cache
def _triton_compiles() -> bool:
    """Whether triton is there, with what it needs: a driver, and a C compiler for what starts its kernels."""
    if importlib.util.find_spec("triton") is None:
        return False
    try:
        from triton.runtime.driver import driver

        driver.active.get_current_device()
    except Exception as error:  # whatever a compiler, a linker or a driver comes up with
        warnings.warn(
            f"triton cannot compile here, so the loss runs through plain torch, which is slower: {error}",
            RuntimeWarning,
            stacklevel=2,
        )
        return False
    return True


def _tile_rows(logits_CV: Tensor) -> int:
    bytes_a_row = logits_CV.shape[-1] * at_least_fp32(logits_CV.dtype).itemsize
    tile_bytes = _TILE_BYTES.get(logits_CV.device.type, _TILE_BYTES["cuda"])
    return max(1, min(_LARGEST_TILE, tile_bytes // bytes_a_row))


def tile_parts(logits_CV: Tensor, tile_rows: int | None = None) -> Iterator[slice]:
    """The tiles of a chunk, at least one, so that no tokens still give every quantity's name."""
    tokens, tile_rows = len(logits_CV), tile_rows or _tile_rows(logits_CV)
    for start in range(0, max(tokens, 1), tile_rows):
        yield slice(start, min(start + tile_rows, tokens))
