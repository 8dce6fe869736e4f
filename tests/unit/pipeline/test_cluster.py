"""What a plan says of a cluster: the steps that models carry out, what they wait for, and what cannot be."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from potstill.cli import app
from potstill.core.errors import RecipeError
from potstill.core.store import Store
from potstill.pipeline.cluster import ClusterStep
from potstill.pipeline.plan import Plan, make_plan
from potstill.recipe import load_recipe
from potstill.scale import cluster_of

ROWS, TOKENS = 40_000, 1000
TEACHER = {"engine": "openai", "base_url": "http://127.0.0.1:9/v1", "model": "Qwen/Qwen3-32B"}


def recipe(**steps: dict[str, Any]) -> dict[str, Any]:
    """A teacher of 32B writes, its logits are cached, a student of 8B is trained."""
    task = {"task": "chain_sum", "size": ROWS}
    made: dict[str, dict[str, Any]] = {
        "traces": {"do": "generate", "model": "teacher", "data": task, "max_new_tokens": TOKENS},
        "logits": {"do": "cache", "model": "scorer", "data": "traces"},
        "student": {"do": "train", "student": "base", "data": "logits", "batch": 128, "epochs": 2},
    }
    for name, fields in steps.items():
        made[name] = {**made.get(name, {}), **fields}
    models = {"teacher": TEACHER, "scorer": {"path": "Qwen/Qwen3-32B"}, "base": {"path": "Qwen/Qwen3-8B"}}
    return {"name": "big", "models": models, "steps": made}


@pytest.fixture
def plan(tmp_path: Path) -> Any:
    def make(gpus: str, nodes: int = 1, usd: float | None = None, **steps: dict[str, Any]) -> Plan:
        path = tmp_path / "recipe.yaml"
        path.write_text(json.dumps(recipe(**steps)), encoding="utf-8")
        return make_plan(load_recipe(str(path)), Store(tmp_path / "store"), cluster_of(gpus, nodes, usd))

    return make


def _by_name(plan: Plan) -> dict[str, ClusterStep]:
    return {step.name: step for step in plan.on_cluster}


def test_each_step_has_its_gpus_flops_time_and_price(plan: Any) -> None:
    found = plan("8xH200", 16, 3.0)
    steps = _by_name(found)
    assert [*steps] == ["traces", "logits", "student"]
    assert found.problems == [], "a model of 32B is none of this machine's"
    student = steps["student"]
    tokens = 2 * ROWS * TOKENS
    assert student.gpus == 128
    assert student.flops == pytest.approx(6 * 8e9 * tokens, rel=0.1)
    assert student.seconds == pytest.approx(tokens / student.tokens_per_s)
    assert student.network_gb == 3 * 2 * 8
    assert student.cost_usd == pytest.approx(student.seconds / 3600 * 128 * 3.0)
    assert steps["logits"].flops == pytest.approx(2 * 32e9 * ROWS * TOKENS, rel=0.1)
    assert steps["traces"].gpus == 128
    text = found.to_text()
    assert "on 16 nodes of 8 x H200, steps that models carry out:" in text
    assert "of GPUs;" in text
    one = _by_name(plan("8xH200"))
    assert one["traces"].seconds == pytest.approx(16 * steps["traces"].seconds, rel=0.1)
    assert one["student"].cost_usd is None


def test_a_small_batch_leaves_gpus_without_work_and_the_plan_says_so(plan: Any) -> None:
    found = plan("8xH200", 16, student={"batch": 32})
    assert _by_name(found)["student"].gpus == 32
    assert "step student: a batch of 32 rows leaves 96 of 128 GPUs without work" in found.notes


def test_what_does_not_fit_is_a_problem(plan: Any) -> None:
    found = plan("1xA100-40GB")
    assert [
        problem.partition(" does not fit")[0] for problem in found.problems if "fit into one" in problem
    ] == ["step traces: teacher", "step logits: scorer"]
    assert any("weights and their moments do not fit into 1 x A100-40GB" in one for one in found.problems)
    assert "cannot run" in found.to_text()
    assert not plan("8xA100", student={"lora": {}}).problems


def test_a_teacher_that_is_paid_by_the_token_needs_no_gpus(
    plan: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(TEACHER, "price", {"input": 1.0, "output": 2.0})
    found = plan("8xH100")
    assert "traces" not in _by_name(found)
    assert any("it is bought by the token" in note for note in found.notes)
    assert next(step for step in found.steps if step.name == "traces").cost_usd


def test_a_model_of_unknown_size_has_a_note_and_no_figures(
    plan: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(TEACHER, "model", "some-model")
    found = plan("8xH100")
    assert [*_by_name(found)] == ["logits", "student"]
    assert "step traces: no figures for 8 x H100: the size of teacher is not known" in found.notes


def test_the_command_line_takes_nodes_and_prices_with_gpus_alone(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(recipe()), encoding="utf-8")
    given = ["plan", str(path), "--store", str(tmp_path / "store")]
    result = CliRunner().invoke(
        app, [*given, "--gpus", "8xH100", "--nodes", "2", "--gpu-hour", "2", "--json"]
    )
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["cluster"] == "2 nodes of 8 x H100"
    assert [step["name"] for step in found["on_cluster"]] == ["traces", "logits", "student"]
    for wrong, message in (
        (["--nodes", "2"], "there is no --gpus"),
        (["--gpu-hour", "2"], "there is no --gpus"),
        (["--gpus", "8xV100"], "one of A100-40GB, A100, L40S, H100, H200, B200"),
    ):
        failed = CliRunner().invoke(app, [*given, *wrong])
        assert failed.exit_code != 0
        assert isinstance(failed.exception, RecipeError)
        assert message in str(failed.exception)


def test_a_cache_from_traces_takes_no_gpus_and_one_of_a_server_that_bills_is_bought(plan: Any) -> None:
    kept = {"model": "teacher", "from_traces": True, "top_k": 4}
    found = plan("8xH200", 1, 3.0, traces={"logprobs": 5}, logits=kept)
    assert "logits" not in _by_name(found)
