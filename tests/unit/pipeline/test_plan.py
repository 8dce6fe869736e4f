"""What a plan says of a cache step before it runs."""

from pathlib import Path
from typing import Any

import pytest

from potstill.core.store import Store
from potstill.pipeline.plan import make_plan
from potstill.recipe import one_step_recipe


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """A file of twenty plain texts."""
    path = tmp_path / "texts.txt"
    path.write_text("\n\n".join(f"This is text {number}." for number in range(20)), encoding="utf-8")
    return path


# Bytes a token as benchmarks/logit_cache.py measures them on SmolLM2's traces.
@pytest.mark.parametrize(
    ("settings", "bytes_a_token"),
    [
        (["top_k=8"], 21.8),
        (["top_k=16"], 37.5),
        (["top_k=32"], 67.7),
        (["top_k=64"], 125.9),
        (["codec=sampled", "draws=50"], 17.4),
    ],
)
def test_the_bytes_of_a_cache_are_those_measured_for_its_codec(
    tmp_path: Path, texts: Path, shared_model_folder: Path, settings: list[str], bytes_a_token: float
) -> None:
    arguments = [f"model={shared_model_folder}", f"data={texts}", "max_length=100", *settings]
    plan = make_plan(one_step_recipe("cache", arguments), Store(tmp_path / "store"))
    (step,) = plan.steps
    assert plan.problems == []
    assert (step.rows, step.tokens) == (20, 2000)
    assert step.disk_gb == pytest.approx(2000 * bytes_a_token / 1e9, rel=0.06)


def test_a_disk_that_is_too_small_for_a_cache_is_a_problem(
    tmp_path: Path, texts: Path, shared_model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Usage:
        free = 1000

    def usage(folder: Any) -> Usage:
        return Usage()

    monkeypatch.setattr("shutil.disk_usage", usage)
    arguments = [f"model={shared_model_folder}", f"data={texts}", "max_length=100"]
    plan = make_plan(one_step_recipe("cache", arguments), Store(tmp_path / "store"))
    assert any("of disk" in problem for problem in plan.problems)
