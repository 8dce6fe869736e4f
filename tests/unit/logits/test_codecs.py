"""The top-k codec: what is stored, and the signals that come back.

Shapes: N tokens, V vocabulary, K kept ids.
"""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from potstill.core.errors import DataError
from potstill.logits.codecs import TopK, id_type
from potstill.losses.divergences import forward_kl
from potstill.losses.types import Dense, Sparse

V = 50


def _logits(rows: int = 6, width: int = V, spread: float = 3.0) -> Tensor:
    return spread * torch.randn(rows, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def _read(codec: TopK, logits_NV: Tensor, temperature: float = 1.0, k: int | None = None) -> Sparse:
    return codec.decode(codec.pack(codec.encode(logits_NV)), temperature, k)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 5.0])
@pytest.mark.parametrize("k", [1, 8, V - 1, V])
def test_a_stored_signal_is_the_softmax_at_its_temperature_within_fp16_rounding(
    k: int, temperature: float
) -> None:
    logits_NV = _logits()
    signal = _read(TopK(k, V, (0.5, 1.0, 2.0, 5.0)), logits_NV.float(), temperature)
    wanted_NV = (logits_NV / temperature).log_softmax(-1)
    wanted_NK, ids_NK = wanted_NV.topk(k, -1)
    assert torch.equal(signal.ids_NK, ids_NK)
    # Half a unit in the last of fp16's 11 bits, once in the value and once in the normaliser.
    largest = logits_NV.log_softmax(-1).abs().max().item()
    torch.testing.assert_close(
        signal.log_probs_NK.double(), wanted_NK, rtol=0, atol=largest * 2**-10 / temperature
    )
    tail_N = wanted_NV.softmax(-1).scatter(-1, ids_NK, 0.0).sum(-1)
    torch.testing.assert_close(signal.log_tail_N.double().exp(), tail_N, rtol=1e-5, atol=1e-12)
    assert signal.temperature == temperature


def test_kept_probabilities_and_tail_sum_to_one_though_fp16_rounded_them() -> None:
    codec = TopK(40, V, (1.0, 2.0))
    stored = codec.pack(codec.encode(_logits().float()))
    rounded = np.exp(stored["log_probs"].astype(np.float64)).sum(-1) + np.exp(stored["log_tail"][:, 0])
    assert np.abs(rounded - 1).max() > 1e-4, "rounding has no effect here"
    for temperature in codec.temperatures:
        signal = codec.decode(stored, temperature)
        total_N = signal.log_probs_NK.double().exp().sum(-1) + signal.log_tail_N.double().exp()
        torch.testing.assert_close(total_N, torch.ones_like(total_N), rtol=0, atol=2e-6)


def test_the_logsumexp_of_every_temperature_gives_the_raw_logits_back() -> None:
    logits_NV, codec = _logits() + 40, TopK(4, V, (1.0, 3.0))
    encoded = codec.encode(logits_NV)
    for number, temperature in enumerate(codec.temperatures):
        wanted_N = (logits_NV / temperature).logsumexp(-1)
        torch.testing.assert_close(encoded["logsumexp"][:, number], wanted_N, rtol=1e-12, atol=0)
    raw_NK = encoded["log_probs"] + encoded["logsumexp"][:, :1]
    torch.testing.assert_close(raw_NK, logits_NV.topk(4, -1).values, rtol=1e-12, atol=0)


def test_the_tail_is_exact_where_it_is_tiny_and_where_it_is_nearly_everything() -> None:
    peaked = torch.tensor([[60.0, 0.0, 0.0, 0.0]])
    signal = _read(TopK(1, 4), peaked)
    assert signal.log_tail_N.item() == pytest.approx(math.log(3) - 60, rel=1e-6)
    flat = torch.zeros(1, 60_000)
    signal = _read(TopK(2, 60_000), flat)
    assert signal.log_probs_NK.exp().sum().item() == pytest.approx(2 / 60_000, rel=1e-3)
    assert signal.log_tail_N.item() == pytest.approx(math.log1p(-2 / 60_000), rel=1e-3)


def test_fewer_ids_than_stored_are_what_a_smaller_k_would_have_stored() -> None:
    logits_NV = _logits().float()
    for temperature in (1.0, 2.0):
        small = _read(TopK(5, V, (1.0, 2.0)), logits_NV, temperature)
        cut = _read(TopK(40, V, (1.0, 2.0)), logits_NV, temperature, k=5)
        assert torch.equal(cut.ids_NK, small.ids_NK)
        torch.testing.assert_close(cut.log_probs_NK, small.log_probs_NK, rtol=0, atol=0.01)
        torch.testing.assert_close(cut.log_tail_N, small.log_tail_N, rtol=0, atol=0.01)
        total_N = cut.log_probs_NK.exp().sum(-1) + cut.log_tail_N.exp()
        torch.testing.assert_close(total_N, torch.ones_like(total_N), rtol=0, atol=2e-6)


def test_pitfall_1_the_divergence_from_a_stored_signal_is_not_negative() -> None:
    logits_NV, codec = _logits(rows=200).float(), TopK(8, V)
    for student_NV in (logits_NV, logits_NV + 0.01 * logits_NV.flip(0)):
        kl_N = forward_kl(student_NV, _read(codec, logits_NV))
        assert -1e-5 < kl_N.min().item() < kl_N.max().item() < 0.1


def test_with_every_id_stored_the_divergence_is_the_dense_one_within_rounding() -> None:
    teacher_NV, student_NV = _logits().float(), _logits().flip(0).float()
    stored = forward_kl(student_NV, _read(TopK(V, V), teacher_NV))
    torch.testing.assert_close(stored, forward_kl(student_NV, Dense(teacher_NV)), rtol=2e-3, atol=1e-3)


def test_pitfall_3_a_temperature_that_was_not_declared_is_refused_by_name() -> None:
    codec = TopK(4, V, (1.0, 2.0))
    stored = codec.pack(codec.encode(_logits()))
    with pytest.raises(DataError, match=r"temperature 1.5 was not declared(.|\n)*one of 1, 2"):
        codec.decode(stored, 1.5)


@pytest.mark.parametrize("k", [0, 5])
def test_more_ids_than_are_stored_are_refused(k: int) -> None:
    codec = TopK(4, V)
    with pytest.raises(DataError, match=rf"top {k} asked for(.|\n)*1 to 4"):
        codec.decode(codec.pack(codec.encode(_logits())), 1.0, k)


@pytest.mark.parametrize(("vocabulary", "wanted"), [(65_536, np.uint16), (65_537, np.uint32)])
def test_ids_take_two_bytes_up_to_65536_of_them_else_four(vocabulary: int, wanted: type) -> None:
    assert id_type(vocabulary) is wanted
    logits_NV = torch.zeros(1, vocabulary)
    logits_NV[0, -1] = 9.0
    codec = TopK(1, vocabulary)
    stored = codec.pack(codec.encode(logits_NV))
    assert {name: values.dtype for name, values in stored.items()} == {
        "ids": wanted,
        "log_probs": np.float16,
        "logsumexp": np.float32,
        "log_tail": np.float32,
    }
    assert codec.decode(stored, 1.0).ids_NK.item() == vocabulary - 1


def test_more_ids_than_the_vocabulary_has_are_refused() -> None:
    with pytest.raises(DataError, match="top_k is 51, but the vocabulary has 50"):
        TopK(51, V)


def test_a_description_makes_the_same_codec_and_an_unknown_one_is_refused_by_name() -> None:
    codec = TopK(4, V, (1.0, 2.0))
    assert TopK.from_description(codec.describe(), where="here") == codec
    for changed in ({"codec": "sampled"}, {"codec_version": 2}):
        with pytest.raises(
            DataError, match=r"here: the logits are stored by codec '(sampled|topk)', version"
        ):
            TopK.from_description({**codec.describe(), **changed}, where="here")
