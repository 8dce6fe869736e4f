"""Feature losses: how far a student's inner states are from its teacher's, at one pair of layers.

Gradients reach both sides; whoever gives the teacher's states gives them without a graph. Sums are in fp32 at
least.

Shapes: N tokens, C tokens of one chunk, M tokens that these relate to, H student width, I teacher width, R
relation heads, D width of a head.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from potstill.losses.head import at_least_fp32

__all__ = ["cka_distance", "feature_sum", "hidden_cosine", "hidden_mse", "relation_kl"]

_CHUNK_TOKENS = 256


def feature_sum(
    kind: str,
    student_NH: Tensor,
    teacher_NI: Tensor,
    row_tokens: Sequence[int],
    *,
    relation_heads: int = 1,
) -> Tensor:
    """One of "hidden_mse", "hidden_cosine", "cka" and "relations", summed over all tokens.

    The tokens are those of rows of `row_tokens` tokens each, in order. Mean squares and cosines are of one
    token each. Relations and CKA compare the tokens of one row with each other and never those of two; a
    row's CKA counts as often as the row has tokens. So nothing depends on which rows share a micro-batch.
    """
    with torch.autocast(student_NH.device.type, enabled=False):
        dtype = at_least_fp32(torch.promote_types(student_NH.dtype, teacher_NI.dtype))
        student_NH, teacher_NI = student_NH.to(dtype), teacher_NI.to(dtype)
        if kind == "hidden_mse":
            return hidden_mse(student_NH, teacher_NI).sum()
        if kind == "hidden_cosine":
            return hidden_cosine(student_NH, teacher_NI).sum()
        total = student_NH.new_zeros(())
        rows = (torch.split(states, list(row_tokens)) for states in (student_NH, teacher_NI))
        for student_row, teacher_row in zip(*rows, strict=True):
            if kind == "cka":
                total = total + len(student_row) * cka_distance(student_row, teacher_row)
            else:
                assert kind == "relations"
                total = total + relation_kl(student_row, teacher_row, relation_heads).sum()
        return total


def hidden_mse(student_NI: Tensor, teacher_NI: Tensor) -> Tensor:
    """The mean over a state's entries of (student - teacher)^2, one a token (Romero et al. 2015, eq. 3).

    A student's states of another width are projected to the teacher's before.
    """
    return (student_NI - teacher_NI).square().mean(-1)


def hidden_cosine(student_NI: Tensor, teacher_NI: Tensor) -> Tensor:
    """1 - cos(student, teacher), one a token (Sanh et al. 2019, sec. 3); blind to the states' sizes.

    A state of zeros is unlike any other, and has 1.
    """
    return 1 - functional.cosine_similarity(student_NI, teacher_NI, dim=-1)


def cka_distance(student_NH: Tensor, teacher_NI: Tensor) -> Tensor:
    """1 - ||Y^T X||_F^2 / (||X^T X||_F ||Y^T Y||_F) of the centred states, 0 to 1 (linear CKA).

    Kornblith et al. 2019, sec. 3. Widths may differ; rotations and scales of either side change nothing.
    Fewer than two tokens have no similarity to compare, and give 0. With fewer tokens than a state has
    entries it is biased towards 0.
    """
    if len(student_NH) < 2:
        return student_NH.new_zeros(())
    x, y = _centred(student_NH), _centred(teacher_NI)
    if len(x) < min(x.shape[1], y.shape[1]):  # ||Y^T X||_F^2 = <X X^T, Y Y^T>, whichever is smaller
        of_x, of_y = x @ x.T, y @ y.T
        common = (of_x * of_y).sum()
    else:
        of_x, of_y = x.T @ x, y.T @ y
        common = (y.T @ x).square().sum()
    tiny = torch.finfo(x.dtype).tiny
    distance: Tensor = 1 - common / (of_x.norm() * of_y.norm()).clamp_min(tiny)
    return distance


def _centred(states_NH: Tensor) -> Tensor:
    """Centred, and of norm 1, since the squares of squares of large states would overflow."""
    centred = states_NH - states_NH.mean(0)
    norm: Tensor = centred.norm().clamp_min(torch.finfo(centred.dtype).tiny)
    return centred / norm


def relation_kl(student_NH: Tensor, teacher_NI: Tensor, heads: int) -> Tensor:
    """KL(teacher || student) of how one row's tokens relate, its mean over heads, one a token.

    The relations of a token are softmax(x_n x_m^T / sqrt(D)) over itself and the earlier tokens m of its row,
    as a decoder attends, with the vectors x (queries, keys or values of all attention heads) split anew into
    `heads` equal heads, so that the numbers of attention heads and the widths may differ (MiniLMv2, Wang et
    al. 2021, eq. 5 to 7). Chunk by chunk: no more than one chunk's relations are in memory.
    """
    student_RND, teacher_RND = _in_heads(student_NH, heads), _in_heads(teacher_NI, heads)
    parts = [
        checkpoint(_chunk_kl, student_RND, teacher_RND, start, use_reentrant=False)
        for start in range(0, len(student_NH), _CHUNK_TOKENS)
    ]
    return torch.cat(parts) if parts else student_NH.new_zeros(0)


def _in_heads(vectors_NH: Tensor, heads: int) -> Tensor:
    tokens, width = vectors_NH.shape
    assert width % heads == 0
    return vectors_NH.reshape(tokens, heads, width // heads).transpose(0, 1)


def _chunk_kl(student_RND: Tensor, teacher_RND: Tensor, start: int) -> Tensor:
    stop = min(start + _CHUNK_TOKENS, student_RND.shape[1])
    places = torch.arange(stop, device=student_RND.device)
    later_CM = places > places[start:, None]

    def log_relations(vectors_RND: Tensor) -> Tensor:
        scores_RCM = vectors_RND[:, start:stop] @ vectors_RND[:, :stop].transpose(1, 2)
        scores_RCM = scores_RCM / math.sqrt(vectors_RND.shape[2])
        return scores_RCM.masked_fill(later_CM, -torch.inf).log_softmax(-1)

    log_p_RCM, log_q_RCM = log_relations(teacher_RND), log_relations(student_RND)
    ratio_RCM = (log_p_RCM - log_q_RCM).masked_fill(later_CM, 0.0)
    return (log_p_RCM.exp() * ratio_RCM).sum(-1).mean(0)
