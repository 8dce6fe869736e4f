"""The chunked head against the whole computation in one piece.

Shapes: N tokens, H hidden size, V vocabulary.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

import potstill.losses.head as head_module
from potstill.losses.blend import blend
from potstill.losses.head import full_precision_logits, per_token, supervised_pairs, weighted_loss
from potstill.losses.metrics import comparison
from potstill.losses.response import response_loss
from potstill.losses.types import Dense, Live
from potstill.models import hidden_states, output_head

from .distributions import exact_sparse

N, H, V = 11, 6, 17
CHUNKS = [1, 3, 4, 11, 100]


@dataclass
class _Head:
    """Weight, bias and soft cap; counts its calls, one a chunk."""

    weight: Tensor
    bias: Tensor | None = None
    cap: float | None = None
    calls: int = 0
    alive: list[int] = field(default_factory=list)
    made: list[Any] = field(default_factory=list)

    @property
    def parameters(self) -> list[Tensor]:
        return [self.weight] if self.bias is None else [self.weight, self.bias]

    def __call__(self, hidden: Tensor, /) -> Tensor:
        self.calls += 1
        self.alive.append(sum(not one.expired() for one in self.made))
        logits = torch.nn.functional.linear(hidden, self.weight, self.bias)
        if self.cap is not None:
            logits = (logits / self.cap).tanh() * self.cap
        storage = logits.untyped_storage()
        self.made.append(StorageWeakRef(storage))  # type: ignore[no-untyped-call]  # torch gives none
        return logits


def _random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def _case(dtype: torch.dtype = torch.float64) -> tuple[Tensor, _Head, Tensor, Tensor, Dense]:
    hidden_NH = _random(N, H, seed=1, dtype=dtype).requires_grad_()
    weight, bias = _random(V, H, seed=2, dtype=dtype), _random(V, seed=3, dtype=dtype)
    head = _Head(weight.requires_grad_(), bias.requires_grad_(), cap=2.0)
    targets_N = torch.randint(V, (N,), generator=torch.Generator().manual_seed(4))
    weights_N = torch.rand(N, generator=torch.Generator().manual_seed(5), dtype=torch.float64) / N
    return hidden_NH, head, targets_N, weights_N.to(dtype), Dense(_random(N, V, seed=6, dtype=dtype))


def _whole(
    hidden_NH: Tensor, head: _Head, targets_N: Tensor, weights_N: Tensor, teacher: Dense
) -> tuple[Tensor, list[Tensor]]:
    """The blended loss and its gradients by plain autograd over all tokens at once."""
    logits_NV = head(hidden_NH)
    ce = -logits_NV.log_softmax(-1).gather(-1, targets_N[:, None])[:, 0]
    p = (teacher.logits_NV / 2).softmax(-1)
    kl = (p * (p.log() - (logits_NV / 2).log_softmax(-1))).sum(-1)
    loss = ((0.4 * ce + 0.6 * 4 * kl) * weights_N).sum()
    return loss, list(torch.autograd.grad(loss, [hidden_NH, *head.parameters]))


@pytest.mark.parametrize("chunk_tokens", CHUNKS)
def test_loss_and_gradients_are_those_of_the_whole_at_every_chunk_size(chunk_tokens: int) -> None:
    hidden_NH, head, targets_N, weights_N, teacher = _case()
    expected, expected_gradients = _whole(hidden_NH, head, targets_N, weights_N, teacher)
    head.calls = 0
    quantities = blend(targets_N, teacher, alpha=0.6, temperature=2.0)
    loss, values = weighted_loss(hidden_NH, head, quantities, weights_N, chunk_tokens=chunk_tokens)
    assert head.calls == -(-N // chunk_tokens)
    torch.autograd.backward(loss)
    assert head.calls == -(-N // chunk_tokens), "backward ran the head again"
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    for one, gradient in zip([hidden_NH, *head.parameters], expected_gradients, strict=True):
        torch.testing.assert_close(one.grad, gradient, rtol=1e-10, atol=1e-14)
    assert {name: (len(value), value.requires_grad) for name, value in values.items()} == dict.fromkeys(
        ("loss", "cross_entropy", "kl", "agreement"), (N, False)
    )


def test_no_more_than_one_chunk_of_logits_is_alive() -> None:
    hidden_NH, head, targets_N, weights_N, teacher = _case(torch.float32)
    quantities = blend(targets_N, teacher, alpha=0.5, temperature=2.0)
    weighted_loss(hidden_NH, head, quantities, weights_N, chunk_tokens=2)
    per_token(hidden_NH, head, lambda logits, rows: {"view": logits[:, 0]}, chunk_tokens=2)
    assert len(head.alive) == 12
    assert head.alive == [0] * 12, "logits of an earlier chunk were still there when a later one was made"


def test_a_frozen_head_gets_no_gradient_and_a_frozen_trunk_none_either() -> None:
    hidden_NH, head, targets_N, weights_N, _ = _case()
    head.weight.requires_grad_(False)
    loss, _ = weighted_loss(hidden_NH, head, response_loss(targets_N), weights_N, chunk_tokens=4)
    torch.autograd.backward(loss)
    assert head.weight.grad is None
    assert hidden_NH.grad is not None
    assert head.bias is not None
    assert head.bias.grad is not None

    frozen_NH = hidden_NH.detach()
    head.bias.grad = None
    loss, _ = weighted_loss(frozen_NH, head, response_loss(targets_N), weights_N, chunk_tokens=4)
    torch.autograd.backward(loss)
    assert head.bias.grad is not None
    assert frozen_NH.grad is None


def test_without_gradients_it_is_the_same_number_and_no_graph() -> None:
    hidden_NH, head, targets_N, weights_N, _ = _case()
    trained, _ = weighted_loss(hidden_NH, head, response_loss(targets_N), weights_N, chunk_tokens=4)
    with torch.no_grad():
        evaluated, _ = weighted_loss(hidden_NH, head, response_loss(targets_N), weights_N, chunk_tokens=4)
    assert trained.requires_grad
    assert not evaluated.requires_grad
    torch.testing.assert_close(trained.detach(), evaluated, rtol=0, atol=0)


@pytest.mark.gpu
def test_on_a_gpu_no_tokens_and_many_give_the_bf16_head_its_gradient_in_fp32() -> None:
    hidden_NH = _random(N, H, seed=1).to("cuda", torch.bfloat16).requires_grad_()
    head = _Head(_random(V, H, seed=2).to("cuda").float().requires_grad_())
    targets_N, weights_N = torch.arange(N, device="cuda"), torch.full((N,), 1 / N, device="cuda")
    expected_NV = hidden_NH.double() @ head.weight.bfloat16().double().T
    wanted = (torch.nn.functional.cross_entropy(expected_NV, targets_N, reduction="none") * weights_N).sum()
    (wanted_gradient,) = torch.autograd.grad(wanted, [head.weight])
    for tokens in (0, N):
        head.weight.grad = None
        rows = slice(0, tokens)
        with torch.autocast("cuda", torch.bfloat16):
            loss, _ = weighted_loss(
                hidden_NH[rows], head, response_loss(targets_N[rows]), weights_N[rows], chunk_tokens=4
            )
        torch.autograd.backward(loss)
        assert head.weight.grad is not None
        assert head.weight.grad.dtype == torch.float32
        expected = wanted_gradient if tokens else torch.zeros_like(head.weight)
        torch.testing.assert_close(head.weight.grad, expected.float(), rtol=2e-2, atol=2e-3)


def test_no_supervised_tokens_give_a_zero_loss_with_zero_gradients() -> None:
    hidden_NH, head, targets_N, weights_N, _ = _case()
    loss, values = weighted_loss(hidden_NH[:0], head, response_loss(targets_N[:0]), weights_N[:0])
    torch.autograd.backward(loss)
    assert loss.item() == 0
    assert head.weight.grad is not None
    assert not head.weight.grad.any()
    assert values["cross_entropy"].shape == (0,)


def test_pitfall_4_gradients_do_not_depend_on_the_split_into_micro_batches() -> None:
    hidden_NH, head, targets_N, _, _ = _case()
    weights_N = torch.full((N,), 1 / N, dtype=torch.float64)

    def gradient(*splits: slice) -> Tensor:
        head.weight.grad = None
        for rows in splits:
            loss, _ = weighted_loss(hidden_NH[rows], head, response_loss(targets_N[rows]), weights_N[rows])
            torch.autograd.backward(loss)
        assert head.weight.grad is not None
        return head.weight.grad

    whole = gradient(slice(0, N)).clone()
    torch.testing.assert_close(gradient(slice(0, 2), slice(2, 9), slice(9, N)), whole, rtol=1e-12, atol=0)


def test_pitfall_7_the_state_before_a_token_predicts_it() -> None:
    hidden_BTH = torch.arange(2 * 4, dtype=torch.float32).reshape(2, 4, 1)
    ids_BT = torch.tensor([[10, 11, 12, 13], [20, 21, 22, 0]])
    mask_BT = torch.tensor([[0, 0, 1, 1], [0, 1, 0, 0]])
    hidden_NH, targets_N = supervised_pairs(hidden_BTH, ids_BT, mask_BT)
    assert targets_N.tolist() == [12, 13, 21]
    assert hidden_NH[:, 0].tolist() == [1, 2, 4]


def _bf16_gradient(chunk_tokens: int, device: str) -> tuple[Tensor, Tensor, int]:
    """The head's gradient for bf16 parameters from 1024 tokens that all pull the same way."""
    hidden_NH = torch.full((1024, 4), 1.0, dtype=torch.bfloat16, device=device)
    weight = torch.zeros((8, 4), dtype=torch.bfloat16, device=device, requires_grad=True)
    head = _Head(weight)
    targets_N = torch.zeros(1024, dtype=torch.int64, device=device)
    weights_N = torch.full((1024,), 1 / 1024, device=device)
    loss, _ = weighted_loss(hidden_NH, head, response_loss(targets_N), weights_N, chunk_tokens=chunk_tokens)
    torch.autograd.backward(loss)
    assert weight.grad is not None
    return weight.grad, loss, head.calls


@pytest.mark.parametrize("place", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_pitfall_13_many_bf16_chunks_add_up_to_the_same_gradient_as_one(place: str) -> None:
    one, _, one_call = _bf16_gradient(1024, place)
    many, _, many_calls = _bf16_gradient(2, place)
    assert (one_call, many_calls) == (1, 512)
    assert many.dtype == torch.bfloat16
    # One bf16 rounding at the end; sums in bf16 would stop growing after 256 chunks.
    torch.testing.assert_close(many.float(), one.float(), rtol=2**-7, atol=0)


def test_a_bf16_heads_gradient_is_summed_a_few_ids_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden_NH = _random(N, H, seed=1, dtype=torch.bfloat16)
    targets_N, weights_N = torch.arange(N) % V, torch.full((N,), 1 / N)

    def gradient(product_bytes: int) -> tuple[Tensor, int]:
        monkeypatch.setattr(head_module, "_PRODUCT_BYTES", product_bytes)
        parts = list(head_module._parts(V, hidden_NH))
        head = _Head(_random(V, H, seed=2, dtype=torch.bfloat16).requires_grad_())
        loss, _ = weighted_loss(hidden_NH, head, response_loss(targets_N), weights_N, chunk_tokens=4)
        torch.autograd.backward(loss)
        assert head.weight.grad is not None
        return head.weight.grad, len(parts)

    whole_VH, one = gradient(1 << 20)
    parts_VH, several = gradient(5 * 2 * H)
    assert (one, several) == (1, 4), "17 ids are one part, or three of 5 and the last two"
    # What is rounded is each product's bf16, whose sums are ordered as its shape has it.
    torch.testing.assert_close(parts_VH.float(), whole_VH.float(), rtol=2**-6, atol=1e-4)
    assert parts_VH.abs().amin() > 0, "an id has no gradient"


def test_logits_are_fp32_and_gradients_have_their_parameters_type_under_autocast() -> None:
    hidden_NH, head, targets_N, weights_N, _ = _case(torch.float32)
    seen: list[torch.dtype] = []

    def quantities(logits_CV: Tensor, rows: slice) -> dict[str, Tensor]:
        seen.append(logits_CV.dtype)
        return response_loss(targets_N)(logits_CV, rows)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert head(hidden_NH).dtype == torch.bfloat16, "autocast is off"
        with torch.no_grad():
            full_precision_logits(
                head, hidden_NH
            )  # an earlier pass without gradients must not hide the weight
        chunked, _ = weighted_loss(hidden_NH, head, quantities, weights_N, chunk_tokens=4)
        whole, _ = weighted_loss(hidden_NH, head, quantities, weights_N, chunk_tokens=N)
    torch.autograd.backward(chunked)
    assert set(seen) == {torch.float32}
    assert [one.grad.dtype for one in (hidden_NH, *head.parameters) if one.grad is not None] == [
        torch.float32
    ] * 3
    torch.testing.assert_close(chunked, whole, rtol=1e-6, atol=0)


@pytest.mark.parametrize("chunk_tokens", [2, 100])
def test_a_real_models_loss_and_gradients_are_those_of_its_own_forward(
    tiny_model: torch.nn.Module, chunk_tokens: int
) -> None:
    tiny_model.requires_grad_(True)
    vocabulary = 300  # the models pad theirs past it
    ids_BT = torch.randint(vocabulary, (2, 9), generator=torch.Generator().manual_seed(0))
    mask_BT = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 0, 0, 0, 0]])

    logits_BTV = tiny_model(input_ids=ids_BT, use_cache=False).logits[..., :vocabulary]
    expected = torch.nn.functional.cross_entropy(
        logits_BTV[:, :-1][mask_BT[:, 1:].bool()], ids_BT[:, 1:][mask_BT[:, 1:].bool()], reduction="sum"
    )
    names, parameters = zip(*tiny_model.named_parameters(), strict=True)
    expected_gradients = torch.autograd.grad(expected, parameters, allow_unused=True)

    head = output_head(tiny_model, vocabulary)
    hidden_NH, targets_N = supervised_pairs(hidden_states(tiny_model, ids_BT), ids_BT, mask_BT)
    loss, _ = weighted_loss(
        hidden_NH, head, response_loss(targets_N), torch.ones(len(targets_N)), chunk_tokens=chunk_tokens
    )
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    for name, found, wanted in zip(names, gradients, expected_gradients, strict=True):
        assert (found is None) == (wanted is None), name
        if found is not None:
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5, msg=name)


def test_a_lora_adapted_head_trains_its_adapter_alone(
    build_tiny_model: Callable[..., torch.nn.Module],
) -> None:
    import peft

    settings = peft.LoraConfig(r=2, target_modules=["lm_head", "q_proj"], init_lora_weights=False)
    model = peft.get_peft_model(build_tiny_model("qwen2"), settings)
    ids_BT = torch.randint(300, (2, 6), generator=torch.Generator().manual_seed(0))
    hidden_NH, targets_N = supervised_pairs(hidden_states(model, ids_BT), ids_BT, torch.ones_like(ids_BT))
    expected = model(input_ids=ids_BT, use_cache=False).logits[:, :-1, :300].flatten(0, 1)
    wanted = torch.nn.functional.cross_entropy(expected, targets_N, reduction="sum")
    torch.autograd.backward(wanted)
    gradients = {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}
    model.zero_grad()
    assert any("lm_head.lora_B" in name for name in gradients)

    head = output_head(model, 300)
    loss, _ = weighted_loss(
        hidden_NH, head, response_loss(targets_N), torch.ones(len(targets_N)), chunk_tokens=3
    )
    torch.autograd.backward(loss)
    found = {name: one.grad for name, one in model.named_parameters() if one.grad is not None}
    assert found.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("adapter", [False, True])
def test_a_head_in_four_bits_gives_the_gradient_of_its_dequantised_weight(
    build_tiny_model: Callable[..., torch.nn.Module], adapter: bool
) -> None:
    """As QLoRA has it: the weight itself takes no gradient, what lies before it and an adapter on it do."""
    bitsandbytes, peft = pytest.importorskip("bitsandbytes"), pytest.importorskip("peft")
    plain: Any = build_tiny_model("qwen2").requires_grad_(False)
    four_bits: Any = copy.deepcopy(plain)
    layer = bitsandbytes.nn.Linear4bit(
        *plain.lm_head.weight.shape[::-1], bias=False, compute_dtype=torch.float32, quant_type="nf4"
    )
    layer.weight = bitsandbytes.nn.Params4bit(
        plain.lm_head.weight.data.clone(), requires_grad=False, quant_type="nf4"
    )
    layer.to("cpu")  # which quantises
    assert layer.weight.dtype == torch.uint8
    layer.support_avx512bf16_for_cpu = False
    four_bits.lm_head = layer
    dequantised = bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    assert not torch.allclose(dequantised, plain.lm_head.weight)
    plain.lm_head.weight.data.copy_(dequantised)
    models = [plain, four_bits]
    if adapter:
        settings = peft.LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False)
        torch.manual_seed(0)
        models[0] = peft.get_peft_model(plain, settings)
        models[1] = peft.get_peft_model(four_bits, settings)
        weights = {name: one for name, one in models[0].named_parameters() if "lora_" in name}
        for name, one in models[1].named_parameters():
            if name in weights:
                one.data.copy_(weights[name].data)

    hidden_NH, targets_N = _random(N, plain.config.hidden_size, seed=4).float(), torch.arange(N) % 300
    teacher = exact_sparse(_random(N, 300, seed=5).float(), 8, 2.0)
    results = []
    for model in models:
        hidden_NH = hidden_NH.detach().requires_grad_()
        quantities = blend(targets_N, teacher, alpha=0.5, temperature=2.0)
        loss, _ = weighted_loss(hidden_NH, output_head(model, 300), quantities, torch.ones(N), chunk_tokens=4)
        torch.autograd.backward(loss)
        found = {name: one.grad for name, one in model.named_parameters() if one.grad is not None}
        results.append((loss.detach(), {**found, "hidden": hidden_NH.grad}))
    assert results[1][1].keys() == results[0][1].keys()
    assert len(results[1][1]) == (3 if adapter else 1)
    torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-5, atol=0)
    for name, gradient in results[0][1].items():
        torch.testing.assert_close(results[1][1][name], gradient, rtol=1e-4, atol=1e-5)


def test_a_live_teacher_is_a_dense_one_made_chunk_by_chunk() -> None:
    hidden_NH, head, targets_N, _, _ = _case()
    teacher_hidden_NH, teacher_head = _random(N, H, seed=8), _Head(_random(V, H, seed=9))
    with torch.no_grad():
        dense = Dense(teacher_head(teacher_hidden_NH))
    live = Live(teacher_hidden_NH, teacher_head)
    teacher_head.calls = 0
    found = per_token(hidden_NH, head, comparison(targets_N, live), chunk_tokens=4)
    assert teacher_head.calls == 3
    expected = per_token(hidden_NH, head, comparison(targets_N, dense), chunk_tokens=N)
    for name, values_N in expected.items():
        torch.testing.assert_close(found[name], values_N, rtol=1e-12, atol=1e-15)
