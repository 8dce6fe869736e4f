"""Shipped recipes run whole, on tiny models and a few rows, and hand out what they promise."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from potstill.core.records import RECORDS_FILE, Record, read_records
from potstill.data.chat import Renderer
from potstill.data.sources import read_file
from potstill.models import TransformersModel, load
from potstill.recipe import load_recipe, sweep_variants

from ..rows import write_rows
from ..servers import Reply, completion, running_server, with_logprobs
from .conftest import Command, Outcome, write_recipe

EVIDENCE = Path(__file__).parents[2] / "benchmarks" / "evidence"
THOUGHT = "<|begin_of_thought|>\n\nten and {n}\n\n<|end_of_thought|>"
SOLUTION = "<|begin_of_solution|>\n\nIt is {n}.\n\n<|end_of_solution|>"


def gsm8k_rows(path: Path, count: int) -> dict[str, Any]:
    """Rows as GSM8K has them, in the place of the hub's."""
    rows = [
        {"question": f"What is 10 + {n}?", "answer": f"It is <<10+{n}={10 + n}>>{10 + n}.\n#### {10 + n}"}
        for n in range(count)
    ]
    return {"path": write_rows(path, rows), "dataset": None, "config": None, "split": None, "limit": None}


def open_thoughts_rows(path: Path, count: int) -> dict[str, Any]:
    """Rows as OpenThoughts-114k has them, in the place of the hub's; one of them has no thought."""
    rows = []
    for n in range(count):
        told = f"{THOUGHT}\n\n{SOLUTION}".format(n=n) if n else "No thought at all."
        turns = [{"from": "user", "value": f"What is {n}?"}, {"from": "assistant", "value": told}]
        rows.append({"system": "Use <|begin_of_thought|> and so on.", "conversations": turns})
    return {"path": write_rows(path, rows), "dataset": None, "held_out": 0.3}


def run(potstill: Command, name: str, *arguments: object, **changes: Any) -> Outcome:
    """Run a shipped recipe with changes laid on it, into runs/<name>."""
    recipe = write_recipe(Path("recipe.yaml"), {"extends": name, **changes})
    outcome = potstill("run", recipe, "--output", f"runs/{name}", *arguments)
    assert outcome.code == 0, outcome.err
    return outcome


def records(folder: Path) -> list[Record]:
    return list(read_records(folder / RECORDS_FILE))


def said(record: Record) -> tuple[str, str | None, str | None]:
    return record.messages[-1]["content"], record.reasoning, record.answer


@pytest.fixture
def tiny(tiny_model_folder: Path) -> dict[str, Any]:
    """A tiny model in the place of a declared one, whatever its engine was."""
    return {"path": str(tiny_model_folder), "engine": "transformers", "model": None, "quantize": None}


@pytest.mark.slow
def test_r1_sft_small_hands_out_what_its_users_expect(
    potstill: Command, tiny: dict[str, Any], tmp_path: Path
) -> None:
    sums = {"data": {"size": 12, "held_out": 0.3}}
    exam = {"tasks": {"sums": {"size": 3}}, "max_new_tokens": 8}
    steps = {"traces": sums, "student": {"epochs": 2, "lora": {"rank": 2}}, "exam": exam}
    run(potstill, "r1-sft-small", models={"base": tiny}, steps=steps)
    folder = tmp_path / "runs" / "r1-sft-small"
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert (config["base_kl"], config["lora"]["rank"], config["early_stopping"]["patience"]) == (0.1, 2, 3)
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= {
        path.name for path in (folder / "final_model").iterdir()
    }
    merged = {path.name for path in (folder / "merged_model").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= merged
    assert "adapter_config.json" not in merged
    results = json.loads((folder / "evaluation_results.json").read_text(encoding="utf-8"))
    assert list(results["models"]) == ["base", "student"]
    log = (folder / "distillation_pipeline.log").read_text(encoding="utf-8")
    assert "student: train" in log
    assert "exam: done in" in log
    for name in ("final_model", "merged_model"):
        assert load(TransformersModel(path=str(folder / name))).model is not None


@pytest.mark.parametrize("name", ["r1-sft", "r1-sft-small"])
def test_early_stopping_of_r1_sft_has_evaluations_enough_to_stop(name: str) -> None:
    """The first evaluation that counts is always a fall, and `patience` must follow it."""
    train: Any = load_recipe(name).graph.nodes["student"].settings
    stopping = train.early_stopping
    evaluations = train.epochs * (114_000 / train.batch / stopping.every if stopping.every else 1)
    assert evaluations > stopping.patience + 1


@pytest.mark.slow
def test_rows_in_openthoughts_shape_are_the_rows_that_are_trained_on(
    potstill: Command, tiny: dict[str, Any], tmp_path: Path
) -> None:
    run(
        potstill,
        "r1-sft-small",
        "--only",
        "traces",
        models={"base": tiny},
        steps={"traces": {"data": {"size": 12}}},
    )
    folder = tmp_path / "runs" / "r1-sft-small"
    rows = [
        json.loads(line) for line in (folder / "open_thoughts.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert {tuple(row) for row in rows} == {("system", "conversations")}
    assert all("<|begin_of_thought|>" in row["conversations"][1]["value"] for row in rows)
    traces = records(folder / "traces")
    read = list(read_file(folder / "open_thoughts.jsonl"))
    assert [said(one) for one in read] == [said(one) for one in traces]
    assert [one.prompt_id for one in read] == [one.prompt_id for one in traces]


@pytest.mark.slow
def test_r1_sft_trains_and_evaluates_apart(potstill: Command, tiny: dict[str, Any], tmp_path: Path) -> None:
    exam = {
        "tasks": {
            "open_thoughts": {"limit": 2},
            "gsm8k": {"data": gsm8k_rows(tmp_path / "gsm8k.jsonl", 3)},
        },
        "max_new_tokens": 8,
    }
    changes = {
        "models": {"base": tiny},
        "steps": {
            "traces": {"data": open_thoughts_rows(tmp_path / "rows.jsonl", 16)},
            "student": {"epochs": 1, "lora": {"rank": 2}, "max_length": 256},
            "exam": exam,
        },
    }
    trained = ("--only", "traces", "--only", "student", "--only", "merged")
    run(potstill, "r1-sft", *trained, **changes)
    folder = tmp_path / "runs" / "r1-sft"
    assert (folder / "merged_model" / "model.safetensors").is_file()
    assert not (folder / "evaluation_results.json").exists()
    told = records(folder / "traces")
    assert "<think>\nten and 5\n</think>\n\nIt is 5." in [one.response for one in told]
    assert {one.messages[0]["role"] for one in told} == {"system"}
    outcome = run(potstill, "r1-sft", "--only", "exam", **changes)
    assert "student: train already made" in outcome.err
    results = json.loads((folder / "evaluation_results.json").read_text(encoding="utf-8"))
    assert set(results["models"]["student"]["tasks"]) == {"open_thoughts", "gsm8k"}
    assert "correct" in results["models"]["student"]["tasks"]["gsm8k"]["verdicts"]
    # The model that was handed out is evaluated as another one would be.
    changes["steps"]["exam"] = {**exam, "models": {"student": str(folder / "final_model")}}
    again = run(potstill, "r1-sft", "--only", "exam", "--only", "traces", **changes)
    assert "student" not in again.err.partition("exam: evaluate")[0].split()


@pytest.mark.slow
def test_gsm8k_response_keeps_the_answers_and_an_adapter_an_epoch(
    potstill: Command, tiny: dict[str, Any], tmp_path: Path
) -> None:
    task = {"data": gsm8k_rows(tmp_path / "test.jsonl", 3), "max_new_tokens": 8}
    exam = {"tasks": {"gsm8k": task}, "max_new_tokens": 8}
    run(
        potstill,
        "gsm8k-response",
        models={"teacher": tiny, "base": tiny},
        steps={
            "answers": {
                "data": gsm8k_rows(tmp_path / "train.jsonl", 16),
                "max_new_tokens": 24,
                "held_out": 0.3,
            },
            "student": {"lora": {"rank": 2}, "batch": 4},
            "exam": exam,
        },
    )
    _check_gsm8k(tmp_path / "runs" / "gsm8k-response", "What is 10 + ")


@pytest.mark.slow
def test_gsm8k_response_small_keeps_the_answers_and_an_adapter_an_epoch(
    potstill: Command, tiny: dict[str, Any], tmp_path: Path
) -> None:
    run(
        potstill,
        "gsm8k-response-small",
        models={"writer": tiny, "teacher": tiny},
        steps={
            # Word problems are longer than a tiny model's context.
            "answers": {"data": {"task": "chain_sum", "size": 12}, "max_new_tokens": 24, "held_out": 0.3},
            "pruned": {"layers": 1, "samples": 4},
            "student": {"lora": {"rank": 2}, "batch": 4},
            "exam": {"max_new_tokens": 8},
        },
    )
    _check_gsm8k(tmp_path / "runs" / "gsm8k-response-small", "")


def _check_gsm8k(folder: Path, question: str) -> None:
    text = (folder / "questions-and-answers.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines()]
    ended = [one for one in records(folder / "answers") if one.finish_reason == "stop"]
    assert [(row["question"], row["answer"], row["reference"]) for row in rows] == [
        (one.messages[-1]["content"], one.response, one.reference) for one in ended
    ]
    assert all(row["question"].startswith(question) for row in rows)
    weights = {
        (folder / place / "adapter_model.safetensors").read_bytes()
        for place in ("epochs/1", "epochs/2", "epochs/3", "epochs/4")
    }
    assert len(weights) == 4, "an adapter an epoch"
    assert (folder / "final_model" / "adapter_model.safetensors").read_bytes() in weights
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "epoch1" in page


def _check_dasd(folder: Path) -> None:
    kept = {name: records(folder / name) for name in ("calm-picked", "lively-picked")}
    for rows in kept.values():
        assert any("divergence" in one.scores for one in rows)
    stages = {
        name: json.loads((folder / name / "manifest.json").read_text("utf-8"))
        for name in ("stage1", "stage2")
    }
    first, second = (one["metrics"] for one in stages.values())
    assert first["eval_loss_before"] != second["eval_loss_before"]
    assert (folder / "stage1" / "adapter_model.safetensors").read_bytes() != (
        folder / "stage2" / "adapter_model.safetensors"
    ).read_bytes()
    exam = json.loads((folder / "exam" / "manifest.json").read_text("utf-8"))["metrics"]
    assert set(exam["models"]) >= {"base", "stage1", "student"}
    for name in ("calm-picked", "lively-picked"):
        assert (folder / "report.figures" / f"{name}-scores.svg").exists()
    assert "stage2" in (folder / "report.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_dasd_small_selects_and_trains_two_stages_in_4_bits(
    potstill: Command, tiny: dict[str, Any], tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes")
    calm = {"data": {"task": "chain_sum", "size": 24}, "limit": None, "max_new_tokens": 12, "held_out": 0.25}
    run(
        potstill,
        "dasd-small",
        models={"writer": tiny, "teacher": tiny},
        steps={
            "calm": calm,
            "lively": {"max_new_tokens": 12},
            "pruned": {"layers": 1, "samples": 4},
            "stage1": {"epochs": 1},
            "stage2": {"epochs": 1},
            "exam": {"tasks": {"sums": {"size": 2}}, "max_new_tokens": 8},
        },
    )
    folder = tmp_path / "runs" / "dasd-small"
    _check_dasd(folder)
    config = json.loads((folder / "stage2" / "adapter_config.json").read_text("utf-8"))
    assert config["r"] == 8
    pruned = json.loads((folder / "pruned" / "manifest.json").read_text("utf-8"))
    assert pruned["extra"]["quantize"] == "nf4"


@pytest.mark.slow
def test_dasd_buys_its_traces_from_a_server(
    potstill: Command, tiny: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The seed's recipe itself, NF4 student included, with songs from a file and a server on this machine."""
    pytest.importorskip("bitsandbytes")
    monkeypatch.setenv("TEACHER_API_KEY", "canary")
    songs = [{"lyrics": f"La la {number}"} for number in range(24)]
    data = {
        "path": write_rows(tmp_path / "songs.jsonl", songs),
        "dataset": None,
        "streaming": None,
        "held_out": 0.25,
    }
    with running_server() as server:
        server.always = lambda body: Reply(body=with_logprobs(completion(f"Of {body['temperature']}, sung.")))
        run(
            potstill,
            "dasd",
            models={"big": {"base_url": server.base_url}, "base": {**tiny, "quantize": "nf4"}},
            steps={
                "calm": {"data": data},
                "stage1": {"epochs": 1},
                "stage2": {"epochs": 1},
                "exam": {"max_new_tokens": 8},
            },
        )
    # Requests for one token asked the server what its log-probabilities are.
    asked = [body for body in server.requests if body["max_tokens"] > 1]
    assert {body["temperature"] for body in asked} == {0.3, 0.9}
    assert all(body["messages"][0]["content"].startswith("You are a literary critic") for body in asked)
    folder = tmp_path / "runs" / "dasd"
    _check_dasd(folder)
    assert not [path for path in folder.rglob("*.*") if path.is_file() and b"canary" in path.read_bytes()]


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["sampled", "mixed-policy"])
def test_the_papers_dasd_trains_on_the_candidates_of_a_server_that_have_most_teacher_sentences(
    potstill: Command, tiny: dict[str, Any], tmp_path: Path, variant: str
) -> None:
    """The recipe itself, all weights trained, with prompts from a file; four candidates a prompt."""
    prompts = [{"prompt": f"How much is {number} and one?"} for number in range(12)]
    data = {
        "path": write_rows(tmp_path / "prompts.jsonl", prompts),
        **dict.fromkeys(("dataset", "config", "streaming", "limit")),
        "held_out": 0.25,
    }
    short = {"epochs": 1, "batch": 4, "max_length": None, "max_tokens": None}
    mixed_policy = {
        "models": {"continuer": {"path": tiny["path"]}},
        "steps": {
            "rollouts": {"limit": 6, "max_new_tokens": 8},
            "mixed": {"limit": 4, "max_new_tokens": 8},
            "mixed-picked": {"filters": None},
            "stage3": short,
        },
    }
    sweep = ["--sweep", variant] if variant == "mixed-policy" else []
    with running_server() as server:

        def answer(body: dict[str, Any]) -> Reply:
            told = f"<think>One more of {body['seed'] % 97}.</think> So {body['temperature']}. That is all."
            return Reply(body=with_logprobs(completion(told)))

        server.always = answer
        recipe = write_recipe(
            Path("recipe.yaml"),
            {
                "extends": "dasd-paper",
                "models": {
                    "big": {"base_url": server.base_url, "tokenizer": tiny["path"]},
                    "base": tiny,
                },
                "steps": {
                    "calm": {"data": data},
                    "lively": {"data": data},
                    "stage1": short,
                    "stage2": short,
                },
                "variants": {"mixed-policy": mixed_policy},
            },
        )
        outcome = potstill("run", recipe, "--output", "runs/paper", *sweep)
    assert outcome.code == 0, outcome.err
    folder = tmp_path / "runs" / "paper"
    if sweep:
        folder /= variant
        assert (folder / "stage3" / "model.safetensors").exists()
        assert all(one.prefix_characters for one in records(folder / "mixed"))
    asked = [body for body in server.requests if body["max_tokens"] > 1]
    assert len(asked) == 2 * 4 * len(prompts)
    assert {body["temperature"] for body in asked} == {0.6, 1.0}
    for name in ("calm-picked", "lively-picked"):
        picked = [one for one in records(folder / name) if not one.held_out]
        assert len({one.prompt_id for one in picked}) == len(picked), "one candidate a prompt"
        assert all("teacher_sentences" in one.scores for one in picked)
    assert (folder / "stage2" / "model.safetensors").exists()


@pytest.mark.slow
def test_three_kinds_train_one_student_on_as_many_tokens(
    potstill: Command, tiny: dict[str, Any], tmp_path: Path
) -> None:
    traces = {"data": {"task": "chain_sum", "size": 16}, "max_new_tokens": 12, "held_out": 0.3}
    run(
        potstill,
        "three-kinds",
        models={"writer": tiny, "teacher": tiny},
        steps={"traces": traces, "logits": {"top_k": 8}, "pruned": {"layers": 1, "samples": 4}},
    )
    folder = tmp_path / "runs" / "three-kinds"
    kinds = ("response", "logit", "feature")
    manifests = {name: json.loads((folder / name / "manifest.json").read_text("utf-8")) for name in kinds}
    assert len({one["tokens"] for one in manifests.values()}) == 1
    assert len({one["counts"]["steps"] for one in manifests.values()}) == 1
    for name, manifest in manifests.items():
        assert manifest["peak_memory_bytes"] > 1e6, name
    page = (folder / "report.html").read_text(encoding="utf-8")
    for head in ("tokens/s", "memory"):
        assert f'<th scope="col">{head}</th>' in page
    exam = json.loads((folder / "exam" / "manifest.json").read_text("utf-8"))["metrics"]
    assert set(exam["differences"]) >= set(kinds)
    assert all("feature" in one for one in manifests["feature"]["metrics"]["history"] if "loss" in one)


@pytest.mark.slow
def test_prune_heal_heals_two_students_of_one_size_on_the_same_logits(
    potstill: Command, tiny: dict[str, Any], tmp_path: Path
) -> None:
    traces = {"data": {"task": "chain_sum", "size": 16}, "max_new_tokens": 12, "held_out": 0.3}
    run(
        potstill,
        "prune-heal",
        models={"writer": tiny, "teacher": tiny},
        steps={
            "traces": traces,
            "logits": {"top_k": 8},
            "shallow": {"layers": 1, "samples": 4},
            "searched": {"target_params": 17_504, "candidates": 4, "samples": 4},
            "shallow-healed": {"epochs": 1},
            "searched-healed": {"epochs": 1},
        },
    )
    folder = tmp_path / "runs" / "prune-heal"
    names = ("shallow", "searched", "shallow-healed", "searched-healed")
    manifests = {name: json.loads((folder / name / "manifest.json").read_text("utf-8")) for name in names}
    assert manifests["shallow"]["counts"]["parameters"] == 17_504
    assert 0.7 * 17_504 < manifests["searched"]["counts"]["parameters"] <= 17_504
    assert manifests["shallow-healed"]["tokens"] == manifests["searched-healed"]["tokens"]
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "searched: sizes that were tried" in page
    assert page.index("checkpoint 0") < page.index("searched: sizes that were tried")
    exam = json.loads((folder / "exam" / "manifest.json").read_text("utf-8"))["metrics"]
    assert {"student", "shallow", "searched"} <= set(exam["differences"])


@pytest.mark.parametrize("variant", ["drop-one", "even", "copied"])
def test_variants_of_prune_heal_load(variant: str) -> None:
    assert "searched-healed" in load_recipe("prune-heal", variant=variant).graph.order


@pytest.mark.parametrize(
    ("name", "variants"),
    [
        ("three-kinds.yaml", "response,logit,feature,both"),
        ("forgetting.yaml", "free,held,tight"),
        ("features.yaml", "logits,cosine,mse,cka,relations"),
        ("dasd.yaml", "rule,random,length,calm-only,lively-only,one-stage"),
    ],
)
def test_evidence_is_a_sweep_of_its_variants(name: str, variants: str) -> None:
    recipes = sweep_variants(str(EVIDENCE / name), [variants, "seed=1,2"], [])
    assert len(recipes) == 2 * len(variants.split(","))
    declared = yaml.safe_load((EVIDENCE / name).read_text(encoding="utf-8"))["variants"]
    assert set(variants.split(",")) == set(declared)


@pytest.mark.parametrize("variant", ["served", "right-only"])
def test_variants_of_gsm8k_response_load(variant: str) -> None:
    assert load_recipe("gsm8k-response", variant=variant).graph.order[0] == "answers"


TINY_MIXTURE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "head_dim": 8,
    "num_experts": 8,
    "moe_intermediate_size": 24,
}


@pytest.mark.slow
def test_moe_heal_small_makes_a_mixture_halves_its_experts_and_heals_it(
    potstill: Command, tiny: dict[str, Any], tmp_path: Path
) -> None:
    steps = {
        "problems": {"data": {"size": 40}, "held_out": 0.2},
        "untrained": {"samples": 2, "config": TINY_MIXTURE},
        "mixture": {"tokens": 4000},
        "compressed": {"keep_ratio": 0.5},
        "healed": {
            "stages": [
                {
                    "name": "experts",
                    "max_steps": 3,
                    "groups": [{"match": r"\.mlp\.experts\."}, {"match": ".", "lr_multiplier": 0}],
                },
                {"name": "all", "max_steps": 3},
            ]
        },
        "exam": {"max_new_tokens": 4},
    }
    outcome = run(potstill, "moe-heal-small", models={"tokenizer": tiny}, steps=steps)
    assert "2 routers to 2 of 8 experts" in outcome.err + outcome.out
    folder = tmp_path / "runs" / "moe-heal-small"

    def manifest(step: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((folder / step / "manifest.json").read_text(encoding="utf-8"))
        return found

    experts, healed = manifest("healed-experts"), manifest("healed")
    assert 0 < experts["counts"]["trained_parameters"] < 0.6 * experts["counts"]["parameters"]
    assert healed["counts"]["trained_parameters"] == healed["counts"]["parameters"]
    assert [point["step"] for point in healed["metrics"]["expert_load"]] == [0, 3]
    assert experts["metrics"]["expert_load"][1]["counts"] == healed["metrics"]["expert_load"][0]["counts"]
    shared = json.loads((folder / "healed" / "config.json").read_text(encoding="utf-8"))
    assert shared["compression_config"]["method"] == "shared_core"
    report = (folder / "report.html").read_text(encoding="utf-8")
    assert "Load of the experts before training" in report
    exam = manifest("exam")["metrics"]["models"]
    assert {"checkpoint-0", "healed", "mixture"} == exam.keys()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variant", "overrides"), [("two-stages", []), ("router-only", ["compressed.experts=4"])]
)
def test_moe_heal_goes_from_plain_text_to_a_healed_student(
    potstill: Command, build_family_folder: Any, tmp_path: Path, variant: str, overrides: list[str]
) -> None:
    texts = [{"text": ""}, *({"text": f" = Ten and {n} = \n The answer is {10 + n} ."} for n in range(24))]
    rows = {"path": write_rows(tmp_path / "wiki.jsonl", texts), "dataset": None, "config": None}
    folder = build_family_folder("qwen3_moe")
    steps: dict[str, Any] = {
        "compressed": {"data": {**rows, "held_out": 0.3}, "samples": 8},
        "logits": {"data": {**rows, "held_out": 0.3}, "max_length": 64},
        "healed": {"batch": 4},
        "exam": {"data": {**rows, "split": None}},
    }
    run(
        potstill,
        "moe-heal",
        *overrides,
        "--sweep",
        variant,
        models={"original": {"path": str(folder)}},
        steps=steps,
    )
    made = json.loads(
        (tmp_path / "runs" / "moe-heal" / variant / "healed" / "manifest.json").read_text(encoding="utf-8")
    )
    before, *_, after = [point["eval_kl"] for point in made["metrics"]["history"] if "eval_kl" in point]
    assert before > 0, "a compressed student is not its teacher"
    assert after != before
    four_experts_in_two_layers = 2 * 4 * 32
    only_routers = made["counts"]["trained_parameters"] == four_experts_in_two_layers
    assert only_routers is (variant == "router-only")


@pytest.mark.slow
def test_seq2seq_small_trains_new_encoder_decoders_and_examines_them_beside_another_model(
    potstill: Command, tiny: dict[str, Any], tmp_path: Path
) -> None:
    few = {"epochs": 1, "batch": 8}
    steps = {
        "problems": {"data": {"size": 30}, "held_out": 0.2},
        "blank": {"config": {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2}, "samples": 2},
        "whole": few,
        "two-tasks": few,
        "exam": {"max_new_tokens": 4},
    }
    run(potstill, "seq2seq-small", models={"smollm2": tiny}, steps=steps)
    folder = tmp_path / "runs" / "seq2seq-small"
    for step, begins in (("whole", "What"), ("two-tasks", "[label] What")):
        student = load(TransformersModel(path=str(folder / step)))
        assert student.model.config.is_encoder_decoder
        prompt = Renderer(student.tokenizer).prompt_text([{"role": "user", "content": "What is 3 + 4?"}])
        assert prompt.startswith(begins)
    manifest = json.loads((folder / "exam" / "manifest.json").read_text(encoding="utf-8"))
    assert list(manifest["metrics"]["models"]) == ["smollm2", "whole", "two-tasks"]
    card = (folder / "whole" / "README.md").read_text(encoding="utf-8")
    assert "AutoModelForSeq2SeqLM" in card
