"""The codecs: what is stored of a distribution, and the signals that come back.

Shapes: N tokens, V vocabulary, K kept ids, D draws.
"""

import json
import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from potstill.core.errors import DataError
from potstill.logits.codecs import Codec, Draws, TopK, codec_of, describe, id_type
from potstill.losses.divergences import forward_kl
from potstill.losses.types import Dense, Sampled, Sparse

V = 50


def _logits(rows: int = 6, width: int = V, spread: float = 3.0) -> Tensor:
    return spread * torch.randn(rows, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def _read(codec: TopK, logits_NV: Tensor, temperature: float = 1.0, k: int | None = None) -> Sparse:
    return codec.decode(codec.pack(codec.encode(logits_NV)), temperature, k)


def _stored_error(log_probs: Tensor) -> Tensor:
    """The most that a stored log-probability may be off by."""
    return (1 + log_probs.abs()) / 512


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 5.0])
@pytest.mark.parametrize("k", [1, 8, V - 1, V])
def test_a_stored_signal_is_the_softmax_at_its_temperature_within_the_stated_error(
    k: int, temperature: float
) -> None:
    logits_NV = _logits()
    signal = _read(TopK(k, V, (0.5, 1.0, 2.0, 5.0)), logits_NV.float(), temperature)
    wanted_NV = (logits_NV / temperature).log_softmax(-1)
    wanted_NK, ids_NK = wanted_NV.topk(k, -1)
    assert torch.equal(signal.ids_NK, ids_NK)
    # What is stored is rounded, and the sum of all kept is put right: that moves them by no more than their
    # mean error, which the probabilities weigh.
    error_NK = _stored_error(logits_NV.log_softmax(-1).gather(-1, ids_NK)) / temperature
    mean_error_N1 = (wanted_NK.softmax(-1) * error_NK).sum(-1, keepdim=True)
    off_NK = (signal.log_probs_NK.double() - wanted_NK).abs()
    assert (off_NK <= error_NK + mean_error_N1 + 2**-10 + 1e-6).all()
    assert off_NK.max() > 1e-5, "nothing was rounded"
    tail_N = wanted_NV.softmax(-1).scatter(-1, ids_NK, 0.0).sum(-1)
    torch.testing.assert_close(signal.log_tail_N.double().exp(), tail_N, rtol=2**-10, atol=1e-12)
    assert signal.temperature == temperature


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.floats(-60, 60), min_size=4, max_size=12),
    st.integers(1, 12),
    st.sampled_from([0.5, 1.0, 3.0]),
)
def test_kept_probabilities_and_tail_sum_to_one_whatever_the_logits(
    logits: list[float], k: int, temperature: float
) -> None:
    codec = TopK(min(k, len(logits)), len(logits), (0.5, 1.0, 3.0))
    signal = _read(codec, torch.tensor([logits]), temperature)
    total = signal.log_probs_NK.double().exp().sum(-1) + signal.log_tail_N.double().exp()
    assert total.item() == pytest.approx(1, abs=2e-6)


@pytest.mark.parametrize("temperature", [1e-3, 0.01])
def test_a_temperature_at_which_every_kept_probability_underflows_gives_a_distribution(
    temperature: float,
) -> None:
    logits_NV = torch.linspace(0, 8, V).flip(0).repeat(3, 1)
    assert (logits_NV.log_softmax(-1).max() / temperature).exp() == 0
    signal = _read(TopK(8, V, (1.0, temperature)), logits_NV, temperature)
    wanted_NK = (logits_NV.double() / temperature).log_softmax(-1)[:, :8]
    total_N = signal.log_probs_NK.double().exp().sum(-1) + signal.log_tail_N.double().exp()
    torch.testing.assert_close(total_N, torch.ones(3, dtype=torch.float64), rtol=0, atol=2e-5)
    assert torch.equal(signal.top_ids, torch.zeros(3, dtype=torch.int64))
    assert (signal.log_probs_NK[:, 0] - wanted_NK[:, 0]).abs().max() < 0.1


def test_rounding_alone_would_let_probabilities_and_tail_sum_past_one() -> None:
    codec = TopK(40, V, (1.0, 2.0))
    stored = codec.pack(codec.encode(_logits().float()))
    levels = stored["level_steps"].cumsum(1, dtype=np.int64)
    rounded = np.exp(-np.expm1(levels / 256)).sum(-1)
    kept = codec.decode(stored, 1.0).log_probs_NK.double().exp().sum(-1).numpy()
    assert np.abs(rounded - kept).max() > 1e-4


def test_the_logsumexp_of_every_temperature_gives_the_raw_logits_back() -> None:
    logits_NV, codec = _logits() + 40, TopK(4, V, (1.0, 3.0))
    encoded = codec.encode(logits_NV)
    for number, temperature in enumerate(codec.temperatures):
        wanted_N = (logits_NV / temperature).logsumexp(-1)
        torch.testing.assert_close(encoded["logsumexp"][:, number], wanted_N, rtol=1e-12, atol=0)
    raw_NK = encoded["log_probs"] + encoded["logsumexp"][:, :1]
    torch.testing.assert_close(raw_NK, logits_NV.topk(4, -1).values, rtol=1e-12, atol=0)


def test_the_tail_is_right_where_it_is_tiny_and_where_it_is_nearly_everything() -> None:
    peaked = torch.tensor([[60.0, 0.0, 0.0, 0.0]])
    signal = _read(TopK(1, 4), peaked)
    assert signal.log_tail_N.item() == pytest.approx(math.log(3) - 60, abs=2**-10)
    flat = torch.zeros(1, 60_000)
    signal = _read(TopK(2, 60_000), flat)
    assert signal.log_probs_NK.exp().sum().item() == pytest.approx(2 / 60_000, rel=1e-3)
    assert signal.log_tail_N.item() == pytest.approx(math.log1p(-2 / 60_000), rel=1e-3)


def test_ids_of_no_probability_are_kept_as_such() -> None:
    logits = torch.tensor([[0.0, -math.inf, 0.0, -math.inf]])
    signal = _read(TopK(3, 4), logits)
    assert signal.log_probs_NK[0, :2].exp().tolist() == pytest.approx([0.5, 0.5])
    assert signal.log_probs_NK[0, 2].exp() == 0
    assert signal.log_tail_N.item() == -math.inf


def test_fewer_ids_than_stored_are_what_a_smaller_k_would_have_stored() -> None:
    logits_NV = _logits(rows=50).float()
    for temperature in (1.0, 2.0):
        small = _read(TopK(5, V, (1.0, 2.0)), logits_NV, temperature)
        cut = _read(TopK(40, V, (1.0, 2.0)), logits_NV, temperature, k=5)
        assert torch.equal(cut.ids_NK, small.ids_NK)
        # They are the same numbers but for the sums that they are put right by, and for the tail's sum.
        limit_NK = 2 * _stored_error(small.log_probs_NK) / temperature + 2**-9
        assert ((cut.log_probs_NK - small.log_probs_NK).abs() <= limit_NK).all()
        torch.testing.assert_close(cut.log_tail_N, small.log_tail_N, rtol=0, atol=0.02)
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
        "level_steps": np.uint16,
        "tail_odds": np.int16,
        "logsumexp": np.float16,
    }
    assert codec.decode(stored, 1.0).ids_NK.item() == vocabulary - 1


def test_more_ids_than_the_vocabulary_has_are_refused() -> None:
    with pytest.raises(DataError, match="top_k is 51, but the vocabulary has 50"):
        TopK(51, V)


@pytest.mark.parametrize("codec", [TopK(4, V, (1.0, 2.0)), Draws(50, V, (2.0,), seed=7)])
def test_a_description_makes_the_same_codec_and_an_unknown_one_is_refused_by_name(codec: Codec) -> None:
    described = json.loads(json.dumps(describe(codec)))
    assert codec_of(described, where="here") == codec
    for changed in ({"codec": "best"}, {"codec_version": 1}):
        with pytest.raises(
            DataError, match=r"here: the logits are stored by codec '(best|topk|sampled)', version"
        ):
            codec_of({**described, **changed}, where="here")


def test_log_probs_from_elsewhere_are_kept_as_those_of_logits() -> None:
    logits_NV, codec = _logits(), TopK(5, V)
    values_NK, ids_NK = logits_NV.log_softmax(-1).topk(5, -1)
    given = [
        dict(zip(ids.tolist(), ones.tolist(), strict=True))
        for ids, ones in zip(ids_NK, values_NK, strict=True)
    ]
    found = codec.pack(codec.from_log_probs([dict(reversed(one.items())) for one in given]))
    wanted = codec.pack(codec.encode(logits_NV))
    assert all(np.array_equal(found[name], wanted[name]) for name in ("ids", "level_steps"))
    assert np.abs(found["tail_odds"].astype(int) - wanted["tail_odds"]).max() <= 1


def test_an_id_past_the_vocabulary_is_left_to_the_tail() -> None:
    codec = TopK(2, 4)
    signal = codec.decode(codec.pack(codec.from_log_probs([{7: math.log(0.3), 1: math.log(0.6)}])), 1.0)
    assert signal.ids_NK[0].tolist() == [1, 0]
    assert signal.log_probs_NK.exp()[0].tolist() == pytest.approx([0.6, 0.0], abs=1e-3)
    assert signal.log_tail_N.exp().item() == pytest.approx(0.4, rel=1e-3)


def test_probabilities_that_sum_past_1_leave_no_tail() -> None:
    codec = TopK(2, 4)
    signal = codec.decode(codec.pack(codec.from_log_probs([{0: math.log(0.7), 1: math.log(0.3001)}])), 1.0)
    assert signal.log_tail_N.exp().item() < 1e-11
    assert signal.log_probs_NK.exp().sum().item() == pytest.approx(1)


KEY = bytes(range(32))


def _draw(codec: Draws, logits_NV: Tensor, key: bytes = KEY) -> dict[str, Tensor]:
    return codec.encoder([key], [len(logits_NV)])(logits_NV, slice(0, len(logits_NV)))


def _sample(codec: Draws, logits_NV: Tensor, key: bytes = KEY) -> Sampled:
    return codec.decode(codec.pack(_draw(codec, logits_NV, key)), codec.temperatures[0])


def test_shares_are_the_counts_of_distinct_ids_the_most_drawn_first() -> None:
    codec, logits_NV = Draws(50, V), _logits(rows=20)
    drawn_ND = _draw(codec, logits_NV)["drawn"]
    signal = _sample(codec, logits_NV)
    for drawn, ids, shares in zip(drawn_ND, signal.ids_NK, signal.shares_NK, strict=True):
        counted = Counter(drawn.tolist())
        kept = {id_: share for id_, share in zip(ids.tolist(), shares.tolist(), strict=True) if share}
        assert kept == pytest.approx({id_: count / 50 for id_, count in counted.items()})
        assert shares.tolist() == sorted(shares.tolist(), reverse=True)
    torch.testing.assert_close(signal.shares_NK.sum(-1), torch.ones(20))


@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.0])
def test_the_expected_share_is_the_probability_at_the_temperature_of_the_draws(temperature: float) -> None:
    draws, rows = 200, 500
    logits_NV = _logits(rows=1).expand(rows, V)
    signal = _sample(Draws(draws, V, (temperature,)), logits_NV)
    shares_V = torch.zeros(rows, V, dtype=torch.float64)
    shares_V.scatter_add_(-1, signal.ids_NK, signal.shares_NK.double())
    wanted_V = (logits_NV[0] / temperature).softmax(-1)
    spread_V = (wanted_V * (1 - wanted_V) / (draws * rows)).sqrt()
    assert ((shares_V.mean(0) - wanted_V).abs() <= 4.5 * spread_V + 1e-9).all()
    assert signal.temperature == temperature


def test_draws_depend_on_seed_and_row_alone_not_on_the_batch() -> None:
    codec, other = Draws(50, V, seed=1), Draws(50, V, seed=2)
    logits_NV, keys = _logits(rows=9), [KEY, KEY[::-1]]
    alone = [_draw(codec, logits_NV[:4], keys[0])["drawn"], _draw(codec, logits_NV[4:], keys[1])["drawn"]]
    encode = codec.encoder(keys, [4, 5])
    together = torch.cat([encode(logits_NV[rows], rows)["drawn"] for rows in (slice(0, 3), slice(3, 9))])
    assert torch.equal(together, torch.cat(alone))
    assert not torch.equal(_draw(other, logits_NV[:4], keys[0])["drawn"], alone[0])
    assert not torch.equal(_draw(codec, logits_NV[:4], keys[1])["drawn"], alone[0])


def test_an_id_without_probability_is_never_drawn() -> None:
    logits_NV = torch.full((64, V), -math.inf)
    logits_NV[:, [3, 17]] = 0.0
    assert set(_draw(Draws(200, V), logits_NV)["drawn"].unique().tolist()) == {3, 17}


def test_pitfall_3_a_sample_stands_for_its_own_temperature_only() -> None:
    codec = Draws(50, V, (2.0,))
    stored = codec.pack(_draw(codec, _logits()))
    with pytest.raises(DataError, match=r"temperature 1 was not declared(.|\n)*one of 2"):
        codec.decode(stored, 1.0)
    with pytest.raises(DataError, match=r"top 8 asked for(.|\n)*these ids were drawn"):
        codec.decode(stored, 2.0, 8)


def test_more_draws_than_a_byte_counts_are_kept() -> None:
    logits_NV = torch.zeros(2, V)
    logits_NV[:, 5] = 50.0
    signal = _sample(Draws(1000, V), logits_NV)
    assert signal.ids_NK.tolist() == [[5], [5]]
    assert signal.shares_NK.tolist() == [[1.0], [1.0]]


@pytest.mark.parametrize("codec", [TopK(4, V, (1.0, 2.0)), Draws(50, V)], ids=["topk", "sampled"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_without_a_distribution_are_refused_rather_than_packed(codec: Codec, bad: float) -> None:
    logits_NV = _logits(rows=9)
    logits_NV[5, 7] = bad
    kept = codec.encoder([KEY], [len(logits_NV)])(logits_NV, slice(0, len(logits_NV)))
    with pytest.raises(DataError, match=r"record 12: token 5 of those kept has no distribution \(NaN\)"):
        codec.pack(kept, where="record 12")


def test_a_tail_that_is_not_a_number_is_refused() -> None:
    codec = TopK(4, V, (1.0, 2.0))
    kept = codec.encode(_logits())
    kept["tail_odds"][3, 1] = math.nan
    with pytest.raises(DataError, match="logits: token 3 of those kept has no distribution"):
        codec.pack(kept)
