"""What is the kernel's own: blocks, strides, padding, and that it compiles for GPUs.

That it computes what the tiles do is tested with them, in test_closed_form.

Shapes: N tokens, V vocabulary, K the teacher's kept ids.
"""

import os
import subprocess
import sys
import types
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from potstill.losses import closed_form
from potstill.losses.blend import blend
from potstill.losses.closed_form import ClosedForm
from potstill.losses.head import weighted_loss
from potstill.losses.types import Dense, Sampled, Sparse, TeacherSignal

from .distributions import exact_sparse, random_logits

N = 6
KINDS = ["dense", "sparse", "sampled"]
WIDE = 9001  # three blocks, the last of which is no multiple of anything

pytest.importorskip("triton", reason="`make check` installs triton, and so does torch for GPUs on Linux")


@pytest.fixture(params=["interpreted", pytest.param("on a GPU", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """Where the kernel runs, in blocks of its own sizes."""
    if request.param == "on a GPU":
        yield "cuda"
        return
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("the kernel runs on the GPU here, without triton's interpreter")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # the interpreter's NumPy, where a GPU is silent
        yield "cpu"


@pytest.fixture
def by_kernel(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Switches the kernel on or off, whatever the device."""

    def switch(on: bool) -> None:
        monkeypatch.setattr(closed_form, "_has_kernel", lambda logits: on)

    return switch


def _signal(kind: str, teacher_NV: Tensor, temperature: float = 2.0) -> TeacherSignal:
    if kind == "dense":
        return Dense(teacher_NV)
    if kind == "sparse":
        return exact_sparse(teacher_NV, 300, temperature)
    # Rows of one to six distinct ids; the ids of the padding are also drawn ones.
    ids_NK = torch.stack([(torch.arange(6) * 1500 + row) % teacher_NV.shape[1] for row in range(N)])
    places_K, counts_N1 = torch.arange(6), torch.arange(1, N + 1)[:, None]
    shares_NK = torch.where(places_K < counts_N1, 1.0 / counts_N1, 0.0)
    ids_NK = torch.where(places_K < counts_N1, ids_NK, ids_NK[:, :1])
    device = teacher_NV.device
    return Sampled(ids_NK.to(device), shares_NK.to(device, teacher_NV.dtype), temperature)


def _closed(kind: str, teacher_NV: Tensor, targets_N: Tensor) -> ClosedForm:
    quantities = blend(targets_N, _signal(kind, teacher_NV), alpha=0.5, temperature=2.0)
    assert isinstance(quantities, ClosedForm)
    return quantities


def _overwritten(closed: ClosedForm, logits_NV: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    values = closed.overwrite(logits_NV, slice(0, N), torch.linspace(0.1, 1, N, device=logits_NV.device))
    return values, logits_NV


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_several_blocks_and_of_a_wider_stride_give_what_the_tiles_give(
    kind: str, device: str, by_kernel: Callable[[bool], None]
) -> None:
    teacher_NV = random_logits(2, N, WIDE).to(device)
    targets_N = torch.tensor([0, 1501, 4096, 8191, 8192, WIDE - 1], device=device)
    closed = _closed(kind, teacher_NV, targets_N)
    padded_NV = random_logits(1, N, WIDE + 23).to(device)
    signal = closed.teacher
    assert isinstance(signal, Dense | Sparse | Sampled)
    padded_NV[:3].scatter_(-1, signal.top_ids[:3, None], 20.0)
    found_NV, padding_NV = padded_NV[:, :WIDE], padded_NV[:, WIDE:].clone()
    by_kernel(False)
    wanted, wanted_NV = _overwritten(closed, found_NV.clone())
    by_kernel(True)
    found, found_NV = _overwritten(closed, found_NV)
    assert not found_NV.is_contiguous()
    assert found["agreement"].tolist() == [1, 1, 1, 0, 0, 0]
    for name, value_N in wanted.items():
        torch.testing.assert_close(found[name], value_N, rtol=1e-10, atol=1e-13, msg=name)
    torch.testing.assert_close(found_NV, wanted_NV, rtol=1e-9, atol=1e-15)
    assert torch.equal(padded_NV[:, WIDE:], padding_NV), "the kernel wrote past the vocabulary"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_narrow_types_are_summed_in_fp32(
    kind: str, dtype: torch.dtype, device: str, by_kernel: Callable[[bool], None]
) -> None:
    teacher_NV = random_logits(2, N, WIDE).to(device)
    logits_NV = random_logits(1, N, WIDE).to(device, dtype)
    targets_N = torch.arange(N, device=device)
    by_kernel(False)
    wanted, wanted_NV = _overwritten(_closed(kind, teacher_NV, targets_N), logits_NV.double())
    by_kernel(True)
    found, found_NV = _overwritten(_closed(kind, teacher_NV.float(), targets_N), logits_NV.clone())
    assert found["loss"].dtype == torch.float32
    torch.testing.assert_close(found["loss"].double(), wanted["loss"], rtol=3e-6, atol=3e-6)
    tolerance = {"rtol": 2 * torch.finfo(dtype).eps, "atol": 1e-6}
    torch.testing.assert_close(found_NV.double(), wanted_NV, **tolerance)


def test_no_tokens_give_every_quantity(device: str, by_kernel: Callable[[bool], None]) -> None:
    by_kernel(True)
    empty_NV = torch.zeros(0, 9, device=device)
    closed = blend(torch.zeros(0, dtype=torch.int64, device=device), Dense(empty_NV), alpha=0.5)
    assert isinstance(closed, ClosedForm)
    values = closed.overwrite(empty_NV, slice(0, 0), torch.zeros(0, device=device))
    assert {name: len(value_N) for name, value_N in values.items()} == dict.fromkeys(
        ("loss", "cross_entropy", "kl", "agreement"), 0
    )


_COMPILES = """
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from potstill.losses.closed_form_triton import _WARPS, _closed_form, _come_back, _leave

POINTERS = {"targets": "*i64", "tops": "*i64", "ids": "*i64", "kept": "*fp32", "values": "*fp32"}
POINTERS |= {"of_target": "*fp32", "of_teacher": "*fp32", "teacher": "*fp32", "tails": "*fp32"}
POINTERS["logits"] = "*bf16"

def made(kernel, target, absent=(), **fixed):
    fixed |= dict.fromkeys(absent)
    names = kernel.arg_names
    signature = {name: "constexpr" if name in fixed else POINTERS.get(name, "i32") for name in names}
    places = {(names.index(name),): value for name, value in fixed.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=places)
    return compile(source, target=target, options={"num_warps": _WARPS}).asm

fixed = {"TEMPERATURE": 3.0, "SMALLEST": 1.2e-38, "GRADIENT": True, "BLOCK": 4096, "KEPT_BLOCK": 64}
for target in (GPUTarget("cuda", 80, 32), GPUTarget("cuda", 90, 32), GPUTarget("hip", "gfx942", 64)):
    for signal, absent in (
        ("none", ("ids", "kept", "teacher", "tails", "tops")),
        ("Dense", ("ids", "kept", "tails")),
        ("Sparse", ()),
        ("Sampled", ("tails",)),
    ):
        keeps = signal in ("Sparse", "Sampled")
        asm = made(_closed_form, target, absent, SIGNAL=signal, KEEPS=keeps, **fixed)
        print(signal, target.arch, *asm)
    for kernel in (_leave, _come_back):
        print(kernel.__name__, target.arch, *made(kernel, target, SAMPLED=True, KEPT_BLOCK=64))
"""


@pytest.mark.slow
def test_it_compiles_for_the_gpus_of_today() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", _COMPILES], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(done.stdout.splitlines()) == 3 * 6


class _Driver(types.ModuleType):
    def __init__(self, fault: Exception | None) -> None:
        super().__init__("triton.runtime.driver")
        self.driver, self.fault = self, fault

    @property
    def active(self) -> "_Driver":
        if self.fault is not None:
            raise self.fault
        return self

    def get_current_device(self) -> int:
        return 0


@pytest.fixture
def _asked_anew() -> Iterator[None]:
    closed_form._triton_compiles.cache_clear()
    yield
    closed_form._triton_compiles.cache_clear()


@pytest.mark.usefixtures("_asked_anew")
def test_without_a_c_compiler_plain_torch_does_it_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    fault = RuntimeError("Failed to find C compiler")
    monkeypatch.setitem(sys.modules, "triton.runtime.driver", _Driver(fault))
    with pytest.warns(RuntimeWarning, match="plain torch, which is slower: Failed to find C compiler"):
        assert not closed_form._triton_compiles()
    monkeypatch.setitem(sys.modules, "triton.runtime.driver", _Driver(None))
    closed_form._triton_compiles.cache_clear()
    assert closed_form._triton_compiles()


@pytest.mark.usefixtures("_asked_anew")
def test_without_triton_plain_torch_does_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert not closed_form._triton_compiles()


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_a_row_behind_two_thousand_million_logits_is_found(kind: str) -> None:
    stride = 2**31 // (N - 1) + 8
    storage = torch.zeros(stride * (N - 1) + WIDE, dtype=torch.bfloat16, device="cuda")
    found_NV = storage.as_strided((N, WIDE), (stride, 1))
    assert (N - 1) * stride > 2**31
    found_NV.copy_(random_logits(1, N, WIDE))
    teacher_NV = random_logits(2, N, WIDE).to("cuda", torch.float32)
    closed = _closed(kind, teacher_NV, torch.arange(N, device="cuda"))
    assert closed_form._has_kernel(found_NV)
    wanted, wanted_NV = _overwritten(closed, found_NV.contiguous())
    found, found_NV = _overwritten(closed, found_NV)
    assert torch.equal(found["loss"], wanted["loss"])
    assert torch.equal(found_NV, wanted_NV)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_on_a_gpu_a_chunk_of_logits_is_all_that_a_loss_takes_beyond_its_gradients(kind: str) -> None:
    tokens, width, vocabulary, chunk_tokens = 2048, 512, 65_536, 256
    generator = torch.Generator("cuda").manual_seed(0)

    def made(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device="cuda", dtype=torch.bfloat16)

    hidden_NH, weight_VH = made(tokens, width).requires_grad_(), (0.1 * made(vocabulary, width)).float()
    targets_N = torch.randint(vocabulary, (tokens,), generator=generator, device="cuda")
    weights_N = torch.full((tokens,), 1 / tokens, device="cuda")
    ids_NK = torch.arange(64, device="cuda").expand(tokens, -1) * 1000
    shares_NK = torch.full((tokens, 64), 1 / 64, device="cuda")
    signal: TeacherSignal = Sampled(ids_NK, shares_NK, 2.0)
    if kind == "dense":
        signal = Dense(made(tokens, vocabulary))
    elif kind == "sparse":
        signal = Sparse(ids_NK, shares_NK.log() - 0.1, torch.full((tokens,), -2.35, device="cuda"), 2.0)
    quantities = blend(targets_N, signal, alpha=0.5, temperature=2.0)

    class Head:
        def __init__(self) -> None:
            self.weight = weight_VH.requires_grad_()
            self.parameters = (self.weight,)

        def __call__(self, hidden: Tensor, /) -> Tensor:
            return torch.nn.functional.linear(hidden, self.weight)

    def step() -> None:
        hidden_NH.grad = weight_VH.grad = None
        with torch.autocast("cuda", torch.bfloat16):
            loss, _ = weighted_loss(hidden_NH, Head(), quantities, weights_N, chunk_tokens=chunk_tokens)
        torch.autograd.backward(loss)

    step()  # loads kernels, makes cuBLAS's workspace
    torch.cuda.synchronize()
    hidden_NH.grad = weight_VH.grad = None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    extra = torch.cuda.max_memory_allocated() - before - weight_VH.nbytes - hidden_NH.nbytes
    chunk, cast = 2 * chunk_tokens * vocabulary, weight_VH.nbytes // 2
    assert extra < cast + 1.5 * chunk, f"{extra / chunk:.1f} chunks"
