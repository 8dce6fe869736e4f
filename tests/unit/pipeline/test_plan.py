"""What a plan says of steps before they run."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from potstill.core.errors import RecipeError
from potstill.core.store import Store
from potstill.models import frozen_weight_bytes, parameter_count
from potstill.models.source import TransformersModel
from potstill.pipeline.plan import Plan, PlannedStep, make_plan
from potstill.recipe import load_recipe, one_step_recipe

from ..mixtures import NEW_MIXTURE


def plan_in(folder: Path, recipe: str | dict[str, Any]) -> Plan:
    """The plan of a recipe in a folder, given as YAML or as what it says."""
    text = recipe if isinstance(recipe, str) else yaml.safe_dump(recipe, sort_keys=False)
    (folder / "recipe.yaml").write_text(text, encoding="utf-8")
    return make_plan(load_recipe(str(folder / "recipe.yaml")), Store(folder / "store"))


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
    # "This is text 9." and "This is text 10." in tokens of three letters, with what ends a text.
    assert (step.rows, step.tokens) == (20, 10 * 6 + 10 * 7)
    assert step.disk_gb == pytest.approx(130 * bytes_a_token / 1e9, rel=0.06)


@pytest.mark.parametrize("limit", [[], ["max_length=100"]], ids=str)
def test_the_tokens_of_long_texts_are_planned_about_as_the_run_finds_them(
    tmp_path: Path, shared_model_folder: Path, tiny_tokenizer: Any, limit: list[str]
) -> None:
    text = " ".join(f"The answer to {number} and {number} is {2 * number}." for number in range(200))
    (tmp_path / "texts.txt").write_text(text, encoding="utf-8")
    arguments = [f"model={shared_model_folder}", f"data={tmp_path / 'texts.txt'}", "top_k=8", *limit]
    plan = make_plan(one_step_recipe("cache", arguments), Store(tmp_path / "store"))
    (step,) = plan.steps
    tokens = len(tiny_tokenizer(text).input_ids)
    assert tokens > 2000, "many windows"
    assert step.tokens == pytest.approx(len(text) / 3, rel=0.02)
    assert tokens / 3 < (step.tokens or 0) < 3 * tokens
    assert step.disk_gb is not None
    assert any("its tokens are an estimate" in note for note in plan.notes)


def test_a_conversation_has_at_most_max_length_tokens_and_keeps_its_response(
    tmp_path: Path, shared_model_folder: Path
) -> None:
    row = json.dumps({"prompt": "p" * 600, "response": "r" * 300}) + "\n"
    (tmp_path / "rows.jsonl").write_text(row * 10, encoding="utf-8")

    def planned(*limit: str) -> tuple[int, float]:
        arguments = [f"model={shared_model_folder}", f"data={tmp_path / 'rows.jsonl'}", "top_k=8", *limit]
        (step,) = make_plan(one_step_recipe("cache", arguments), Store(tmp_path / "store")).steps
        assert step.tokens is not None
        assert step.disk_gb is not None
        return step.tokens, step.disk_gb

    tokens, disk_gb = planned()
    assert 10 * (200 + 100) < tokens < 10 * (200 + 100 + 30)
    assert disk_gb == pytest.approx(10 * 101 * 22.8e-9, rel=0.01)
    assert planned("max_length=50")[0] == 10 * 50


def test_tokens_that_only_a_run_can_tell_are_said_to_be_missing(
    tmp_path: Path, shared_model_folder: Path
) -> None:
    def planned(*settings: str) -> tuple[int | None, list[str]]:
        arguments = [f"model={shared_model_folder}", "data.dataset=nobody/nothing", *settings]
        plan = make_plan(one_step_recipe("cache", arguments), Store(tmp_path / "store"))
        return plan.steps[0].tokens, plan.notes

    assert planned() == (None, ["step cache: its tokens and its disk show once its rows are read"])
    tokens, notes = planned("data.limit=7", "max_length=100")
    assert tokens == 700
    assert any("more tokens than these where texts are longer than max_length" in note for note in notes)


def test_a_cache_takes_the_memory_of_its_model_as_it_is_loaded_and_of_its_batches(
    tmp_path: Path, texts: Path
) -> None:
    def memory_gb(*settings: str) -> float:
        arguments = [f"data={texts}", *settings]
        (step,) = make_plan(one_step_recipe("cache", arguments), Store(tmp_path / "store")).steps
        assert step.memory_gb is not None
        return step.memory_gb

    recipe = f"""
name: packed
models:
  big: {{path: some/model-4B, device: cpu}}
  packed: {{path: some/model-4B, device: cpu, quantize: nf4}}
steps:
  whole: {{do: cache, model: big, data: {texts}, batch_tokens: 1}}
  small: {{do: cache, model: packed, data: {texts}, batch_tokens: 1}}
"""
    steps = plan_in(tmp_path, recipe).steps
    each = frozen_weight_bytes(TransformersModel(path="some/model-4B", device="cpu"))
    # Beside the weights a chunk of logits over the widest vocabulary.
    assert steps[0].memory_gb == pytest.approx(4 * each, abs=0.5)
    assert steps[1].memory_gb == pytest.approx(4 * (0.516 + 0.2), abs=0.5)
    one, two, three = (memory_gb("model=some/model-4B", f"batch_tokens={1000 * n}") for n in (1, 2, 3))
    assert three - two == pytest.approx(two - one)
    assert two > one
    assert memory_gb("model=some/model-4B") > one


@pytest.mark.parametrize(
    ("logprobs", "problem"),
    [
        (1, "top_k is 8, and the traces of traces hold no alternatives to each token"),
        (5, "top_k is 8, and the traces of traces hold 5 alternatives to each token"),
        (8, None),
    ],
)
def test_a_cache_of_more_than_the_traces_will_hold_is_a_problem(
    tmp_path: Path, recipe: dict[str, Any], logprobs: int, problem: str | None
) -> None:
    recipe["steps"]["traces"]["logprobs"] = logprobs
    cache = {"do": "cache", "model": "teacher", "data": "picked", "from_traces": True, "top_k": 8}
    recipe["steps"] = {name: recipe["steps"][name] for name in ("traces", "picked")} | {"logits": cache}
    plan, steps = _planned(recipe, tmp_path)
    found = [one for one in plan.problems if one.startswith("step logits")]
    assert [one.partition("; ")[0] for one in found] == (
        [] if problem is None else [f"step logits: {problem}"]
    )
    assert steps["logits"].memory_gb is None, "no model is loaded"


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


# --- train


PlanOf = Callable[..., Plan]


@pytest.fixture
def plan_of(tmp_path: Path, texts: Path, shared_model_folder: Path) -> PlanOf:
    """`plan_of(train, cache)`: the plan of a train step on a cache step's logits, with further settings."""

    def make(train: str, cache: str = "top_k: 8") -> Plan:
        recipe = f"""
name: planned
models:
  base: {{path: {shared_model_folder}}}
steps:
  logits: {{do: cache, model: base, data: {texts}, max_length: 100, {cache}}}
  student: {{do: train, student: base, data: logits, {train}}}
"""
        return plan_in(tmp_path, recipe)

    return make


@pytest.mark.parametrize(
    ("train", "cache", "problem"),
    [
        ("top_k: 8", "top_k: 8", None),
        ("top_k: 9", "top_k: 8", "step student: top_k is 9, but logits keeps 8"),
        ("top_k: 2", "codec: sampled", "step student: top_k is 2, but logits keeps drawn ids"),
    ],
)
def test_ids_that_a_cache_will_not_keep_are_a_problem(
    plan_of: PlanOf, train: str, cache: str, problem: str | None
) -> None:
    problems = plan_of(train, cache).problems
    assert len(problems) == (problem is not None)
    assert problem is None or problem in problems[0]


def test_ids_of_a_cache_are_a_problem_where_the_data_are_none(plan_of: PlanOf, texts: Path) -> None:
    plan = make_plan(
        one_step_recipe("train", [f"student={texts.parent}/x", f"data={texts}", "top_k=8"]),
        Store(texts.parent / "store"),
    )
    assert any("top_k is 8, but its data are no cached logits" in problem for problem in plan.problems)


def test_a_copy_of_what_is_trained_takes_memory_and_an_adapters_base_none(plan_of: PlanOf) -> None:
    def memory_gb(train: str) -> float:
        plan = plan_of(train)
        assert plan.problems == []
        assert plan.steps[-1].memory_gb is not None
        return plan.steps[-1].memory_gb

    assert memory_gb("base_kl: 0.1") > memory_gb("base_kl: 0.0")
    assert memory_gb("base_kl: 0.1, lora: {rank: 2}") == memory_gb("base_kl: 0.0, lora: {rank: 2}")


def test_features_of_a_cache_or_of_no_teacher_are_a_problem(
    plan_of: PlanOf, texts: Path, shared_model_folder: Path
) -> None:
    (problem,) = plan_of("feature: {kind: cka}").problems
    assert "step student: feature compares inner states with the teacher's, and logits holds" in problem
    fields = [f"student={shared_model_folder}", f"data={texts}", "feature.kind=cka", "feature.layers.2=2"]
    store = Store(texts.parent / "store")
    (problem,) = make_plan(one_step_recipe("train", fields), store).problems
    assert "and there is no teacher" in problem
    assert "train.teacher" in problem
    assert (
        make_plan(one_step_recipe("train", [*fields, f"teacher={shared_model_folder}"]), store).problems == []
    )


@pytest.mark.parametrize(
    ("train", "problem"),
    [
        ("student: packed, lora: {rank: 2}", None),
        ("student: packed", "student: packed is quantised to nf4, and quantised weights cannot be trained"),
        ("student: first", None),
        ("student: first, lora: {rank: 2}", "student: first is an adapter, and lora asks for another one"),
        (
            "student: base, data: logits, mask_prefix: true",
            "logits holds a teacher's logits, which have their",
        ),
    ],
)
def test_what_a_train_step_would_refuse_is_a_problem_before_anything_is_made(
    tmp_path: Path, texts: Path, shared_model_folder: Path, train: str, problem: str | None
) -> None:
    data = "" if "data:" in train else f"data: {texts}, "
    recipe = f"""
name: planned
models:
  base: {{path: {shared_model_folder}}}
  packed: {{path: {shared_model_folder}, quantize: nf4}}
steps:
  logits: {{do: cache, model: base, data: {texts}, max_length: 100}}
  first: {{do: train, student: packed, data: {texts}, lora: {{rank: 2}}}}
  student: {{do: train, {data}{train}}}
"""
    problems = plan_in(tmp_path, recipe).problems
    assert len(problems) == (problem is not None)
    assert problem is None or problem in problems[0]


@pytest.mark.parametrize(("device_has_bf16", "bytes_a_weight"), [(True, 2), (False, 4)])
def test_frozen_weights_count_in_the_type_that_they_are_loaded_in(
    plan_of: PlanOf,
    shared_model_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    device_has_bf16: bool,
    bytes_a_weight: int,
) -> None:
    monkeypatch.setattr("potstill.models.loading.supports_bf16", lambda device: device_has_bf16)
    parameters = parameter_count(TransformersModel(path=str(shared_model_folder)))
    assert parameters is not None
    # One token at a time: next to no activations.
    _, adapter = plan_of("lora: {rank: 2}, device: cpu, max_tokens: 1").steps
    _, whole = plan_of("device: cpu, max_tokens: 1").steps
    assert adapter.memory_gb is not None
    assert whole.memory_gb is not None
    assert whole.memory_gb - adapter.memory_gb == pytest.approx(
        parameters * (16 - bytes_a_weight - 0.16) / 1e9
    )


def planned_and_made(
    folder: Path, model: Path, data: Any, step_context: Any, sizes: dict[str, Any]
) -> tuple[int | None, int]:
    """The parameters of a student as the plan has them, and as the step makes it."""
    from potstill import student

    stated = [f"{key}={json.dumps(value)}" for key, value in sizes.items()]
    recipe = one_step_recipe("init", [f"model={model}", f"data={data.folder}", *stated])
    (step,) = make_plan(recipe, Store(folder / "store")).steps
    context = step_context(
        "init", models={"base": TransformersModel(path=str(model))}, data={"traces": [data]}
    )
    settings = {"do": "init", "model": "base", "data": "traces", "device": "cpu", **sizes}
    made = student.run(student.InitSettings.model_validate(settings), context)
    return step.parameters, made.counts["parameters"]


@pytest.mark.parametrize(
    "sizes",
    [
        {"layers": 1},
        {"layers": 1, "hidden_size": 16, "intermediate_size": 32, "attention_heads": 2},
        {"method": "fresh", "hidden_size": 24},
        {"depth_by": [1]},
        {"method": "copy", "layers": 1},
        {"method": "from_config", "config": NEW_MIXTURE},
    ],
    ids=str,
)
def test_a_students_parameters_are_planned_as_they_will_be(
    tmp_path: Path, shared_model_folder: Path, traces: Any, step_context: Any, sizes: dict[str, Any]
) -> None:
    planned, made = planned_and_made(tmp_path, shared_model_folder, traces(4), step_context, sizes)
    assert planned == made


@pytest.mark.parametrize(
    "sizes",
    [
        {"method": "prune_experts", "experts": 2},
        {"method": "share_experts", "rank": 2},
        {"method": "share_experts", "keep_ratio": 0.6},
        {"method": "to_dense"},
        {"method": "to_dense", "experts": 2},
    ],
    ids=str,
)
def test_a_student_out_of_a_mixture_is_planned_as_it_will_be(
    tmp_path: Path, build_tiny_model: Any, tiny_tokenizer: Any, traces: Any, step_context: Any, sizes: Any
) -> None:
    mixture = build_tiny_model("qwen3_moe")
    mixture.save_pretrained(tmp_path / "mixture")
    tiny_tokenizer.save_pretrained(tmp_path / "mixture")
    planned, made = planned_and_made(tmp_path, tmp_path / "mixture", traces(4), step_context, sizes)
    assert planned == made < mixture.num_parameters()


def test_a_rank_that_saves_nothing_is_a_problem_of_the_plan(
    tmp_path: Path, texts: Path, build_tiny_model: Any, tiny_tokenizer: Any
) -> None:
    build_tiny_model("qwen3_moe").save_pretrained(tmp_path / "mixture")
    tiny_tokenizer.save_pretrained(tmp_path / "mixture")
    arguments = [f"model={tmp_path / 'mixture'}", f"data={texts}", "method=share_experts", "rank=4000"]
    plan = make_plan(one_step_recipe("init", arguments), Store(tmp_path / "store"))
    assert any("more parameters than the experts" in problem for problem in plan.problems)


def test_a_mixtures_blocks_are_told_apart_in_what_is_planned(
    tmp_path: Path, texts: Path, build_tiny_model: Any, tiny_tokenizer: Any
) -> None:
    mixture = build_tiny_model("qwen3_moe", num_hidden_layers=3, mlp_only_layers=[1])
    mixture.save_pretrained(tmp_path / "mixture")
    tiny_tokenizer.save_pretrained(tmp_path / "mixture")

    def planned(*stated: str) -> int | None:
        arguments = [f"model={tmp_path / 'mixture'}", f"data={texts}", *stated]
        return make_plan(one_step_recipe("init", arguments), Store(tmp_path / "store")).steps[0].parameters

    blocks = [sum(one.numel() for one in block.parameters()) for block in mixture.model.layers]
    whole = mixture.num_parameters()
    assert blocks[1] < blocks[0] == blocks[2]
    assert planned("depth_by=[0,2]") == whole - blocks[1]
    assert planned("depth_by=[1,2]") == whole - blocks[0]
    assert planned("method=copy", "layers=2") == whole - blocks[1]
    assert planned("layers=3", "intermediate_size=40") is not None
    assert planned("layers=2") is None


def test_a_configuration_that_makes_no_model_is_a_problem_of_the_plan(
    tmp_path: Path, texts: Path, shared_model_folder: Path
) -> None:
    def plan(**fields: Any) -> Plan:
        config = f"config={json.dumps(NEW_MIXTURE | fields)}"
        arguments = [f"model={shared_model_folder}", f"data={texts}", "method=from_config", config]
        return make_plan(one_step_recipe("init", arguments), Store(tmp_path / "store"))

    assert ["has no field 'num_expert'" in one for one in plan(num_expert=6).problems] == [True]
    assert ["no room for the tokenizer" in one for one in plan(vocab_size=100).problems] == [True]
    small, large = (plan(num_experts=count).steps[0] for count in (6, 60))
    assert small.disk_gb < large.disk_gb
    assert small.memory_gb < large.memory_gb


def test_a_target_is_the_most_that_a_student_has_and_sizes_out_of_reach_are_a_problem(
    tmp_path: Path, texts: Path, shared_model_folder: Path
) -> None:
    def plan(*stated: str) -> Plan:
        arguments = [f"model={shared_model_folder}", f"data={texts}", *stated]
        return make_plan(one_step_recipe("init", arguments), Store(tmp_path / "store"))

    whole = parameter_count(TransformersModel(path=str(shared_model_folder)))
    assert whole is not None
    assert plan("target_params=12K").steps[0].parameters == 12_000
    assert plan("target_ratio=0.5").steps[0].parameters == whole // 2
    assert any("at most 12,000 parameters" in note for note in plan("target_params=12K").notes)
    assert ["7 blocks cannot be kept of 2" in one for one in plan("layers=7").problems] == [True]
    assert ["2 share a key and value head" in one for one in plan("attention_heads=3").problems] == [True]


def memory_gb(texts: Path, name: str, *settings: str) -> float | None:
    """What training a model of the hub is planned to need, that is not here."""
    arguments = [f"student={name}", f"data={texts}", "device=cpu", *settings]
    plan = make_plan(one_step_recipe("train", arguments), Store(texts.parent / "store"))
    return plan.steps[0].memory_gb


def test_activations_grow_with_the_micro_batch_and_shrink_with_checkpointing(texts: Path) -> None:
    def planned(*settings: str) -> float:
        found = memory_gb(texts, "Qwen/Qwen3-4B-Instruct-2507", "lora.rank=8", *settings)
        assert found is not None
        return found

    one, two, three = (planned(f"max_tokens={tokens}") for tokens in (1000, 2000, 3000))
    assert three - two == pytest.approx(two - one)
    assert planned("max_tokens=2000", "activation_checkpointing=true") < two


def test_parts_of_a_student_take_less_memory_than_as_many_whole_ones(texts: Path) -> None:
    def planned(*scale: str) -> float:
        found = memory_gb(texts, "Qwen/Qwen3-4B-Instruct-2507", "max_tokens=1", *scale)
        assert found is not None
        return found

    four = ("scale.engine=torchrun", "scale.nproc_per_node=4")
    weights_gb = 4e9 * 16 / 1e9
    assert planned(*four) == pytest.approx(4 * planned())
    in_parts = planned(*four, "scale.strategy=fsdp2")
    assert planned(*four) - in_parts == pytest.approx(3 * weights_gb, rel=1e-3)


def test_the_size_of_a_hub_model_that_is_not_here_is_what_its_name_says(texts: Path) -> None:
    def planned(name: str) -> float | None:
        return memory_gb(texts, name, "max_tokens=1")

    assert planned("Qwen/Qwen3-4B-Instruct-2507") == pytest.approx(4e9 * 16 / 1e9, rel=0.01)
    # Beside a chunk of logits over the widest vocabulary.
    assert planned("HuggingFaceTB/SmolLM2-135M") == pytest.approx(135e6 * 16 / 1e9, abs=0.4)
    assert planned("some/model-v4") is None


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`machine(gpu_gb, memory_gb)`: this one has a GPU with so much memory free, and so much of its own."""

    def have(gpu_gb: float, memory_gb: float) -> None:
        monkeypatch.setattr("torch.cuda.is_available", lambda: True)
        monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation: True)
        monkeypatch.setattr(
            "torch.cuda.mem_get_info", lambda device: (int(gpu_gb * 1e9), int(gpu_gb * 1.1e9))
        )
        monkeypatch.setattr("potstill.train.throughput.peak_flops_per_s", lambda device, dtype: 1e14)
        monkeypatch.setattr("potstill.scale.local.read_bytes_per_s", lambda device, dtype: 1e12)
        real, own = os.sysconf, {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": int(memory_gb * 1e9 / 4096)}
        monkeypatch.setattr("os.sysconf", lambda name: own[name] if name in own else real(name))

    return have


@pytest.mark.parametrize(
    ("name", "gpu_gb", "memory_gb", "device", "problem"),
    [
        ("some/model-1.2B", 8, 1000, "", "needs about 20 GB of memory; cuda:0 has 8.0 of its 8.8 GB free"),
        ("some/model-2.4B", 80, 25, "", None),
        ("some/model-2.4B", 80, 25, "device=cpu", "needs about 39 GB of memory; this machine has 25 GB"),
        ("some/model-1.2B", 8, 1000, "device=cpu", None),
    ],
)
def test_a_step_has_the_memory_of_the_device_that_it_runs_on(
    texts: Path,
    machine: Callable[..., None],
    name: str,
    gpu_gb: float,
    memory_gb: float,
    device: str,
    problem: str | None,
) -> None:
    machine(gpu_gb, memory_gb)
    arguments = [f"student={name}", f"data={texts}", "max_tokens=64", *filter(None, [device])]
    plan = make_plan(one_step_recipe("train", arguments), Store(texts.parent / "store"))
    assert plan.steps[0].device == ("cpu" if device else "cuda:0")
    # The model itself is not here, which is a problem as well.
    found = [one for one in plan.problems if "of memory" in one]
    assert found == ([] if problem is None else [f"step train {problem}"])


def test_a_training_on_a_gpu_holds_a_chunk_of_logits(texts: Path, machine: Callable[..., None]) -> None:
    machine(80, 25)

    def planned(*device: str) -> float:
        arguments = ["student=some/model-1B", f"data={texts}", "max_tokens=1", *device]
        (step,) = make_plan(one_step_recipe("train", arguments), Store(texts.parent / "store")).steps
        assert step.memory_gb is not None
        return step.memory_gb

    # 2,048 tokens in 16 bits over a vocabulary such as Qwen's; on a CPU 512, which may have no 16 bits.
    assert planned("device=cpu") + (2048 * 2 - 512 * 4) * 150_000 / 1e9 < planned()


def test_the_steps_of_dasd_fit_a_gpu_of_8_gb(tmp_path: Path, machine: Callable[..., None]) -> None:
    machine(8, 16)
    (tmp_path / "songs.jsonl").write_text('{"lyrics": "la la"}\n' * 150, encoding="utf-8")
    own = {"dataset": None, "streaming": None, "path": str(tmp_path / "songs.jsonl")}
    recipe = {
        "extends": "dasd",
        "models": {"big": {"base_url": "http://127.0.0.1:9/v1", "api_key_env": None}},
        "steps": {"calm": {"data": own}},
    }
    plan = plan_in(tmp_path, recipe)
    assert not [one for one in plan.problems if "of memory" in one]
    steps = {step.name: step for step in plan.steps}
    for name in ("calm-picked", "lively-picked", "stage1", "stage2", "exam"):
        assert steps[name].device == "cuda:0"
        assert 2.5 < (steps[name].memory_gb or 0) < 8, name


def test_what_is_decoded_at_once_is_counted_and_cut_to_what_a_gpu_has(
    tmp_path: Path, machine: Callable[..., None]
) -> None:
    (tmp_path / "questions.jsonl").write_text(
        '{"question": "1 + 1?", "answer": "#### 2"}\n', encoding="utf-8"
    )

    def planned(gpu_gb: float, batch: int, max_new_tokens: int = 4096) -> tuple[Plan, float]:
        machine(gpu_gb, 1000)
        arguments = ["models=[some/model-1B]", f"tasks.sums={tmp_path / 'questions.jsonl'}"]
        arguments += [f"batch={batch}", f"max_new_tokens={max_new_tokens}"]
        plan = make_plan(one_step_recipe("evaluate", arguments), Store(tmp_path / "store"))
        assert not [one for one in plan.problems if "of memory" in one]
        return plan, plan.steps[0].memory_gb or 0.0

    one, two, three = (planned(1000, batch)[1] for batch in (64, 128, 192))
    assert three - two == pytest.approx(two - one)
    # A model of a billion weights keeps about 100 KB a token and answer at most.
    assert 64 * 4096 * 50e3 / 1e9 < two - one < 64 * 4096 * 200e3 / 1e9
    assert planned(1000, 128, 2048)[1] < two
    plan, needed = planned(16, 128)
    assert needed < 16
    [note] = [one for one in plan.notes if "at once" in one]
    assert "128 answers at once may need" in note
    assert "cuda:0 has 16.0 of its 17.6 GB free" in note


def test_near_duplicates_take_memory_for_each_row_and_the_plan_says_so(
    tmp_path: Path, shared_model_folder: Path
) -> None:
    rows = '{"prompt": "a", "response": "b"}\n' * 20_000
    (tmp_path / "rows.jsonl").write_text(rows, encoding="utf-8")

    def planned(*filters: str) -> tuple[Plan, float]:
        arguments = [f"data={tmp_path / 'rows.jsonl'}", "rule=none", *filters]
        plan = make_plan(one_step_recipe("select", arguments), Store(tmp_path / "store"))
        return plan, plan.steps[0].memory_gb or 0.0

    plan, memory_gb = planned("filters.near_duplicates=0.9")
    assert memory_gb == pytest.approx(20_000 * 3300 / 1e9)
    assert any(
        "near_duplicates keeps hashes of each row in memory, about 0.1 GB" in one for one in plan.notes
    )
    plan, memory_gb = planned("filters.exact_duplicates=true")
    assert memory_gb == 0.0
    assert not any("near_duplicates" in one for one in plan.notes)


def test_the_time_of_models_that_run_here_is_guessed_and_called_a_guess(
    tmp_path: Path, texts: Path, shared_model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("potstill.train.throughput.peak_flops_per_s", lambda device, dtype: 1e9)
    monkeypatch.setattr("potstill.scale.local.read_bytes_per_s", lambda device, dtype: 1e9)
    arguments = [f"model={shared_model_folder}", f"data={texts}", "max_length=100"]
    plan = make_plan(one_step_recipe("cache", arguments), Store(tmp_path / "store"))
    parameters = parameter_count(TransformersModel(path=str(shared_model_folder)))
    assert parameters is not None
    # Half of the peak, and attention in rows of some tokens beside the weights.
    alone_s = 2 * parameters * (plan.steps[0].tokens or 0) / (0.5 * 1e9)
    assert alone_s < (plan.steps[0].seconds or 0.0) < 3 * alone_s
    assert any("its time is a guess, from what this machine" in note for note in plan.notes)


# --- select


@pytest.fixture
def recipe(texts: Path, shared_model_folder: Path) -> dict[str, Any]:
    """Eighty prompts answered twice, a selection of them, and a training on it."""
    model = {"path": str(shared_model_folder)}
    return {
        "name": "picked",
        "models": {"teacher": model, "base": model, "small": {**model, "quantize": "nf4"}},
        "steps": {
            "traces": {
                "do": "generate",
                "model": "teacher",
                "data": {"task": "chain_sum", "size": 80},
                "samples": 2,
                "max_new_tokens": 10,
                "logprobs": 1,
            },
            "picked": {"do": "select", "data": "traces", "student": "base", "keep": {"top": 0.6}},
            "student": {
                "do": "train",
                "student": "base",
                "data": "picked",
                "epochs": 2,
                "batch": 8,
                "lr": 1e-4,
            },
        },
    }


def _planned(recipe: dict[str, Any], folder: Path, **changes: Any) -> tuple[Plan, dict[str, PlannedStep]]:
    recipe["steps"]["picked"] |= changes
    plan = plan_in(folder, recipe)
    return plan, {step.name: step for step in plan.steps}


def test_what_a_selection_scores_and_what_it_leaves_to_train_on_is_planned(
    tmp_path: Path, recipe: dict[str, Any]
) -> None:
    plan, steps = _planned(recipe, tmp_path)
    assert plan.problems == []
    scored = steps["picked"].tokens
    assert steps["picked"].rows == 96
    assert scored is not None
    assert scored > 160 * 10  # the prompts are read as well
    assert steps["student"].tokens == 2 * 960
    assert steps["student"].rows == 96
    _, steps = _planned(recipe, tmp_path, teacher="teacher")
    assert steps["picked"].tokens == 2 * scored
    _, steps = _planned(recipe, tmp_path, keep={"per_prompt": 1})
    assert (steps["picked"].rows, steps["student"].tokens) == (80, 2 * 800)
    _, steps = _planned(recipe, tmp_path, keep={"threshold": 0.1})
    assert (steps["picked"].rows, steps["student"].tokens) == (160, 2 * 1600)


def test_a_student_in_four_bits_needs_less_memory(
    tmp_path: Path, recipe: dict[str, Any], shared_model_folder: Path
) -> None:
    whole = _planned(recipe, tmp_path)[1]["picked"].memory_gb
    small = _planned(recipe, tmp_path, student="small")[1]["picked"].memory_gb
    assert whole is not None
    assert small is not None
    model = TransformersModel(path=str(shared_model_folder))
    saved = frozen_weight_bytes(model) - frozen_weight_bytes(model.model_copy(update={"quantize": "nf4"}))
    # The embedding stays in 16 bits: a fifth of a byte a weight more.
    assert whole - small == pytest.approx((parameter_count(model) or 0) * (saved - 0.2) / 1e9)


def test_a_mixture_in_four_bits_is_planned_with_its_experts_in_full(tmp_path: Path, texts: Path) -> None:
    recipe = f"""
name: packed
models:
  large: {{path: some/Mixture-30B-A3B, device: cpu, quantize: nf4}}
steps:
  logits: {{do: cache, model: large, data: {texts}, batch_tokens: 1}}
"""
    plan = plan_in(tmp_path, recipe)
    each = frozen_weight_bytes(TransformersModel(path="some/Mixture-30B-A3B", device="cpu"))
    assert plan.steps[0].memory_gb == pytest.approx(3 * 0.516 + 27 * each, abs=1.0)
    assert any("90% of large is experts, which are none and stay in full" in note for note in plan.notes)


def test_scoring_takes_activations_and_logits_beside_the_weights(
    tmp_path: Path, recipe: dict[str, Any]
) -> None:
    def memory_gb(**settings: Any) -> float:
        found = _planned(recipe, tmp_path, **settings)[1]["picked"].memory_gb
        assert found is not None
        return found

    one, two, three = (memory_gb(max_tokens=tokens) for tokens in (1000, 2000, 3000))
    assert three - two == pytest.approx(two - one)
    assert two > one
    recipe["models"]["wide"] = {"path": "some/model-4B"}
    # 4 billion weights in two or four bytes, and 256 tokens of logits.
    assert memory_gb(student="wide", max_tokens=1) % 4 > 256 * 150_000 * 4 / 1e9


def test_traces_that_will_have_no_log_probabilities_are_a_problem(
    tmp_path: Path, recipe: dict[str, Any]
) -> None:
    del recipe["steps"]["traces"]["logprobs"]
    plan, _ = _planned(recipe, tmp_path)
    (problem,) = plan.problems
    assert "the traces of traces have no log-probabilities; set `traces.logprobs=1`" in problem
    plan, _ = _planned(recipe, tmp_path, teacher="teacher")
    assert plan.problems == []


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_a_model_that_cannot_score_a_selection_is_a_problem_before_anything_is_bought(
    tmp_path: Path, recipe: dict[str, Any], role: str
) -> None:
    served = {"engine": "openai", "base_url": "http://127.0.0.1:9/v1", "model": "big"}
    recipe["models"]["big"] = served
    plan, _ = _planned(recipe, tmp_path, **{role: "big"})
    problem = f"step picked: the {role} big is a server, which is asked by token ids, and no tokenizer makes"
    assert [one for one in plan.problems if one.startswith(problem)]
    recipe["models"]["big"] = served | {"tokenizer": recipe["models"]["base"]["path"]}
    plan, _ = _planned(recipe, tmp_path, **{role: "big"})
    assert all("model big: " in one for one in plan.problems), "only the server is missing"


def test_what_a_served_model_bills_for_scoring_is_planned(tmp_path: Path, recipe: dict[str, Any]) -> None:
    big = {"engine": "openai", "base_url": "http://127.0.0.1:9/v1", "model": "big"}
    big |= {"tokenizer": recipe["models"]["base"]["path"], "price": {"input": 1.0, "output": 10.0}}
    recipe["models"]["big"] = big
    plan, steps = _planned(recipe, tmp_path, teacher="big")
    # 160 responses of at most 10 tokens are read, and one token is written a row.
    assert steps["picked"].cost_usd == pytest.approx((1600 * 1.0 + 160 * 10.0) / 1e6)
    assert "step picked: its cost is without that of the prompts" in plan.notes


def test_that_a_file_may_lack_log_probabilities_is_noted(tmp_path: Path, recipe: dict[str, Any]) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "1 + 1", "response": "2"}\n', encoding="utf-8")
    plan, _ = _planned(recipe, tmp_path, data=str(rows))
    assert any("has log-probabilities" in note or "have log-probabilities" in note for note in plan.notes)


def test_a_server_that_continues_no_responses_is_a_problem_before_anything_is_made(
    tmp_path: Path, texts: Path
) -> None:
    recipe: dict[str, Any] = {
        "name": "mixed",
        "models": {"big": {"engine": "openai", "base_url": "http://127.0.0.1:9/v1", "model": "m"}},
        "steps": {
            "mixed": {"do": "generate", "model": "big", "data": str(texts), "continue": {"only": "all"}}
        },
    }

    def problems() -> list[str]:
        return plan_in(tmp_path, recipe).problems

    assert any("step mixed" in one and "not known to continue" in one for one in problems())
    recipe["models"]["big"]["continue_final_message"] = True
    assert not any("not known to continue" in one for one in problems())


# --- retrieve


def test_what_a_retrieval_adds_to_what_is_trained_on_is_planned(
    recipe: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "corpus.jsonl").write_text('{"text": "An article."}\n', encoding="utf-8")
    steps = recipe["steps"]
    steps["found"] = {
        "do": "retrieve",
        "data": "traces",
        "corpus": {"path": str(tmp_path / "corpus.jsonl")},
        "student": "base",
        "document_tokens": 30,
    }
    steps["student"]["data"] = "found"
    plan, planned = _planned(recipe, tmp_path)
    assert plan.problems == []
    assert planned["found"].rows == 160
    assert planned["found"].tokens == 160 * (10 + 30)
    assert planned["student"].tokens == 2 * 160 * (10 + 30)
    steps["found"]["corpus"] = {"path": str(tmp_path / "none.jsonl")}
    plan, _ = _planned(recipe, tmp_path)
    assert any("no such data file" in problem for problem in plan.problems)


# --- evaluate


@pytest.mark.parametrize(
    ("given", "missing"),
    [
        ({"lm_eval": {"tasks": ["arc_easy"]}}, "potstill[lm-eval]"),
        ({"tasks": {"mine": "texts"}, "rouge": True}, "potstill[rouge]"),
    ],
)
def test_a_package_that_an_evaluation_lacks_is_a_problem_before_anything_is_made(
    tmp_path: Path, texts: Path, monkeypatch: pytest.MonkeyPatch, given: dict[str, Any], missing: str
) -> None:
    if "tasks" in given:
        given = {**given, "tasks": {"mine": str(texts)}}
    model = {"engine": "openai", "base_url": "http://127.0.0.1:1/v1", "model": "m"}
    exam = {"do": "evaluate", "models": {"base": "served"}, **given}
    recipe = {"name": "exam", "models": {"served": model}, "steps": {"exam": exam}}

    def missed() -> list[str]:
        plan = plan_in(tmp_path, recipe)
        return [problem for problem in plan.problems if "pip install" in problem]

    monkeypatch.setattr("potstill.evaluate.harness.harness_version", lambda: None)
    monkeypatch.setattr("potstill.evaluate.rouge.importlib.util.find_spec", lambda _: None)
    assert [missing in problem for problem in missed()] == [True]
    monkeypatch.undo()
    monkeypatch.setattr("potstill.evaluate.harness.harness_version", lambda: "0")
    assert missed() == []


# --- cost


def priced_plan(tmp_path: Path, **step: Any) -> Plan:
    """The plan of 40 prompts of 90 letters, asked twice, and of what comes after them."""
    rows = (json.dumps({"prompt": f"{number:090}"}) for number in range(40))
    (tmp_path / "prompts.jsonl").write_text("\n".join(rows), encoding="utf-8")
    model = {"engine": "openai", "base_url": "http://127.0.0.1:1/v1", "model": "m"}
    prices = {} if step.pop("free", False) else {"price": {"input": 1.0, "output": 10.0}}
    asked = {"do": "generate", "model": "big", "max_new_tokens": 100}
    recipe = {
        "name": "priced",
        "models": {"big": {**model, **prices}},
        "steps": {
            "calm": {**asked, "data": {"path": str(tmp_path / "prompts.jsonl")}, "samples": 2} | step,
            "lively": {**asked, "data": "calm:prompts", "temperature": 0.5},
        },
    }
    return plan_in(tmp_path, recipe)


def test_the_cost_of_prompts_and_longest_responses_is_shown(tmp_path: Path) -> None:
    plan = priced_plan(tmp_path)
    calm, lively = plan.steps
    # 30 tokens of a prompt at $1, 100 of a response at $10, a million.
    assert calm.cost_usd == pytest.approx(80 * (30 * 1.0 + 100 * 10.0) / 1e6)
    assert lively.cost_usd is not None
    assert "$0.08" in plan.to_text()
    assert json.loads(plan.to_json())["steps"][0]["cost_usd"] == calm.cost_usd


def test_a_step_costs_no_more_than_it_may(tmp_path: Path) -> None:
    assert priced_plan(tmp_path, max_cost=0.01).steps[0].cost_usd == 0.01


def test_a_bounded_cost_without_a_price_is_a_problem(tmp_path: Path) -> None:
    plan = priced_plan(tmp_path, max_cost=0.01, free=True)
    assert any("max_cost" in problem and "price" in problem for problem in plan.problems)
    assert plan.steps[0].cost_usd is None


@pytest.mark.parametrize("where", ["data", "step"])
def test_a_limit_bounds_what_cannot_be_counted_beforehand(tmp_path: Path, where: str) -> None:
    data: dict[str, Any] = {"dataset": "nobody/nothing"}
    plan = priced_plan(
        tmp_path, **({"data": data, "limit": 7} if where == "step" else {"data": {**data, "limit": 7}})
    )
    calm = plan.steps[0]
    assert (calm.rows, calm.tokens) == (14, 1400)
    assert calm.cost_usd == pytest.approx(1400 * 10 / 1e6)
    assert "step calm: its cost is without that of the prompts" in plan.notes


# --- what a step would find only when it runs


def test_a_temperature_that_a_cache_will_not_keep_is_a_problem(plan_of: PlanOf) -> None:
    assert plan_of("temperature: 2.0", "top_k: 8, temperatures: [2.0]").problems == []
    (problem,) = plan_of("temperature: 2.0").problems
    assert "step student: temperature is 2, and logits keeps 1" in problem
    (problem,) = plan_of("temperature: 1.0", "codec: sampled, temperatures: [2.0]").problems
    assert "step student: temperature is 1, and logits keeps 2" in problem


def test_a_temperature_that_an_imported_cache_does_not_have_is_a_problem(
    tmp_path: Path, shared_model_folder: Path
) -> None:
    store, folder = Store(tmp_path / "store"), tmp_path / "imported"
    folder.mkdir()
    store.seal(
        folder,
        kind="cache",
        fingerprint="f" * 24,
        settings={"imported": "logits.h5"},
        seed=0,
        seconds=0.0,
        extra={"codec": "topk", "k": 8, "temperatures": [1.0]},
    )
    arguments = [f"student={shared_model_folder}", f"data={folder}"]
    assert make_plan(one_step_recipe("train", [*arguments, "temperature=1.0"]), store).problems == []
    (problem,) = make_plan(one_step_recipe("train", [*arguments, "temperature=2.0"]), store).problems
    assert f"temperature is 2, and {folder} keeps 1" in problem


@pytest.fixture
def two_steps(tmp_path: Path, texts: Path, shared_model_folder: Path) -> Callable[[str], list[str]]:
    """`two_steps(second)`: the problems of a recipe with a train step `student` and another one behind it."""

    def make(second: str, train: str = "", generate: str = "") -> list[str]:
        prompts = tmp_path / "prompts.jsonl"
        prompts.write_text('{"prompt": "a"}\n{"prompt": "b"}', encoding="utf-8")
        recipe = f"""
name: planned
models:
  base: {{path: {shared_model_folder}}}
steps:
  begun: {{do: generate, model: base, data: {{path: {prompts}}}}}
  traces: {{do: generate, model: base, data: begun{generate}}}
  student: {{do: train, student: base, data: traces, epochs: 2{train}}}
  {second}
"""
        return plan_in(tmp_path, recipe).problems

    return make


def test_a_mask_for_beginnings_that_nobody_wrote_is_a_problem(two_steps: Any) -> None:
    (problem,) = two_steps("", ", mask_prefix: true")
    assert "step student: mask_prefix leaves nothing out, as traces continues no response" in problem
    assert two_steps("", ", mask_prefix: true", ", continue: {}") == []
    cache = "logits: {do: cache, model: base, data: traces, mask_prefix: true}"
    (problem,) = two_steps(cache)
    assert "step logits: mask_prefix leaves nothing out, as traces continues no response" in problem
    assert two_steps(cache, "", ", continue: {}") == []


def test_merging_what_will_be_no_adapter_is_a_problem(two_steps: Any) -> None:
    merge = "merged: {do: merge, model: student}"
    (problem,) = two_steps(merge)
    assert "step merged: student is no adapter" in problem
    assert two_steps(merge, ", lora: {rank: 2}") == []


def test_several_adapters_to_be_joined_are_planned_for_as_one_is(two_steps: Any) -> None:
    experts = (
        "expert: {do: train, each: {k: [a, b]}, student: base, data: traces%s}\n"
        "  joined: {do: merge, models: expert%s}"
    )
    assert two_steps(experts % (", lora: {rank: 2}", ", method: ties")) == []
    (problem,) = two_steps(experts % ("", ""))
    assert "step joined: expert is no adapter" in problem
    (problem,) = two_steps(experts % (", lora: {rank: 2}", ", weights: [1.0]"))
    assert "1 weights are given, and there are 2 models" in problem
    assert "expert[a], expert[b]" in problem


def test_epochs_are_planned_for_and_named_before_they_are_there(two_steps: Any) -> None:
    merge = "merged: {do: merge, model: student:epoch1}"
    assert two_steps(merge, ", lora: {rank: 2}, keep_epochs: all") == []
    with pytest.raises(RecipeError, match="keeps no models of single epochs"):
        two_steps(merge, ", lora: {rank: 2}")
    with pytest.raises(RecipeError, match="from epoch2 on"):
        two_steps(merge, ", lora: {rank: 2}, keep_epochs: 1")
    with pytest.raises(RecipeError, match="the step trains 2 epochs"):
        two_steps(merge.replace("epoch1", "epoch3"), ", keep_epochs: all")


def evaluation_plan(tmp_path: Path, folder: Path, **step: Any) -> Plan:
    """The plan of an evaluation of a local model and a priced server on five questions."""
    questions = [json.dumps({"question": f"What is {n} + 1?", "answer": str(n + 1)}) for n in range(5)]
    (tmp_path / "sums.jsonl").write_text("\n".join(questions), encoding="utf-8")
    recipe = {
        "name": "exam",
        "models": {
            "base": {"path": str(folder)},
            "served": {
                "engine": "openai",
                "base_url": "http://127.0.0.1:1/v1",
                "model": "big",
                "price": {"input": 1.0, "output": 10.0},
            },
        },
        "steps": {
            "exam": {
                "do": "evaluate",
                "models": ["base", "served"],
                "tasks": {"sums": {"path": str(tmp_path / "sums.jsonl")}},
                **step,
            }
        },
    }
    return plan_in(tmp_path, recipe)


def test_answers_to_every_task_of_every_model_are_planned_and_those_of_servers_priced(
    tmp_path: Path, shared_model_folder: Path
) -> None:
    data = {"path": str(tmp_path / "sums.jsonl")}
    (exam,) = evaluation_plan(tmp_path, shared_model_folder, max_new_tokens=100).steps
    assert exam.rows == 2 * 5
    assert exam.cost_usd == pytest.approx(5 * 100 * 10.0 / 1e6)
    own = {"data": data, "samples": 4, "temperature": 1.0, "limit": 3, "max_new_tokens": 50}
    (exam,) = evaluation_plan(
        tmp_path, shared_model_folder, max_new_tokens=100, tasks={"sums": own}, forgetting={"old": data}
    ).steps
    assert exam.rows == 2 * (3 * 4 + 5)
    assert exam.cost_usd == pytest.approx((3 * 4 * 50 + 5 * 100) * 10.0 / 1e6)


def test_a_served_teacher_of_an_evaluation_is_a_problem_before_anything_is_made(
    tmp_path: Path, shared_model_folder: Path
) -> None:
    plan = evaluation_plan(tmp_path, shared_model_folder, teacher="served")
    assert any(
        "the teacher served is of another engine, and KL needs whole" in problem for problem in plan.problems
    )


def test_a_part_of_a_step_to_be_made_has_as_many_rows_as_its_prompts_say(tmp_path: Path) -> None:
    recipe = load_recipe("cmoe-small", ["traces.held_out=0"])
    rows = {step.name: step.rows for step in make_plan(recipe, Store(tmp_path / "store")).steps}
    domains = ("arithmetic", "algorithmic", "logic", "words")
    assert rows["specialist[logic]"] == rows["retold[logic]"]
    assert 100 < (rows["specialist[logic]"] or 0) <= 150
    assert sum(rows[f"specialist[{one}]"] or 0 for one in domains) == rows["traces"] == rows["undivided"]
