"""The ways on which a loss in closed form runs: on the CPU and on a GPU, by plain torch and by triton."""

import importlib.util
import os
import warnings
from collections.abc import Iterator

import pytest

_WAYS = [
    "torch",
    "triton",
    *(pytest.param(f"{one} on a GPU", marks=pytest.mark.gpu) for one in ("torch", "triton")),
]


@pytest.fixture(params=_WAYS)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The device of one of these ways, which the test then must have gone.

    Without a GPU triton's interpreter runs its kernel, in blocks so small that a test's rows have several.
    """
    from potstill.losses import closed_form

    way, _, gpu = request.param.partition(" ")
    if way == "triton" and importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed: `make check` installs it, and so does torch for GPUs on Linux")
    if way == "triton" and not gpu and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("the kernel runs on the GPU here, without triton's interpreter")
    calls = []
    if way == "triton":
        from potstill.losses import closed_form_triton

        overwrite = closed_form_triton.overwrite
        monkeypatch.setattr(
            closed_form_triton, "overwrite", lambda *given: (calls.append(given), overwrite(*given))[1]
        )
        if not gpu:
            monkeypatch.setattr(closed_form_triton, "_BLOCK", 8)
            monkeypatch.setattr(closed_form_triton, "_KEPT_BLOCK", 4)
    if way == "torch" or not gpu:
        monkeypatch.setattr(closed_form, "_has_kernel", lambda logits: way == "triton")
    with warnings.catch_warnings():
        if way == "triton":  # the interpreter's NumPy warns where a GPU is silent
            warnings.simplefilter("ignore", RuntimeWarning)
        yield "cuda" if gpu else "cpu"
    assert bool(calls) == (way == "triton"), "the test went another way"
