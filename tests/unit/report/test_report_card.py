import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from markdown_it import MarkdownIt

from potstill.core.store import FileEntry
from potstill.report import RunView, model_card

RunBuilder = Callable[..., RunView]


def _card(run: RunView, position: int = 3) -> str:
    return model_card(run, run.steps[position])


def test_a_card_tells_lineage_figures_use_limits_and_settings(build_run: RunBuilder) -> None:
    card = _card(build_run())
    front = yaml.safe_load(card.split("---")[1])
    assert front == {"library_name": "transformers", "tags": ["distillation", "potstill"]}
    for said in (
        "# quickstart: student",
        "| Base | `pruned` (init step, from `teacher` (smollm2-135m-instruct)) |",
        "| Teacher that wrote the traces | `writer` (smollm2-135m-instruct, by llama\\_cpp) |",
        "| Teacher that gave its probabilities | `teacher` (smollm2-135m-instruct) |",
        "180 rows",
        "The student is closer to its teacher than the base, but not clearly right more often.",
        "| KL to the teacher, nats | 6.61 [6.25 to 6.97] | 1.18 [1.09 to 1.27] | – | −5.43 [−5.71 to ",
        "AutoModelForCausalLM.from_pretrained(",
        "potstill chat ",
        "capped at 96 tokens",
        "41 held-out traces",
        "| lr | `0.0003` |",
        "| seed | `7` |",
        "torch 2.13.0+cpu",
    ):
        assert said in card, said


def test_an_adapters_card_loads_it_as_one(build_run: RunBuilder) -> None:
    run = build_run()
    manifest: Any = run.steps[3].manifest
    manifest.files = {"adapter_config.json": FileEntry(sha256="0" * 64, size_bytes=1)}
    card = _card(run)
    assert "library_name: peft" in card
    assert "AutoPeftModelForCausalLM" in card


def test_a_model_that_nobody_evaluated_says_so(build_run: RunBuilder) -> None:
    run = build_run()
    assert "No evaluation of this model was part of the run." in _card(replace(run, steps=run.steps[:4]))


def test_an_evaluation_knows_a_model_by_its_weights_too(build_run: RunBuilder) -> None:
    run = build_run()
    manifest: Any = run.steps[3].manifest
    manifest.model_identity = "weights of student"
    card = _card(
        replace(run, steps=[*run.steps[:3], replace(run.steps[3], name="student[math]"), run.steps[4]])
    )
    assert "The student is closer to its teacher than the base" in card


def test_the_baselines_own_card_has_no_difference_to_itself(build_run: RunBuilder) -> None:
    card = _card(build_run(), 2)
    assert "| 6.61 [6.25 to 6.97] |" in card
    assert "−5.43" not in card


@pytest.mark.parametrize(
    "payload", ["<script>alert(1)</script>", "a | b", "`code` and ``more``", "![x](http://x)", "a\n# b"]
)
def test_names_and_settings_stay_text(build_run: RunBuilder, payload: str) -> None:
    run = build_run()
    manifest: Any = run.steps[3].manifest
    manifest.settings["note"] = payload
    steps = [*run.steps[:3], replace(run.steps[3], name=payload), run.steps[4]]
    card = _card(replace(run, name=payload, steps=steps))
    shown = MarkdownIt("commonmark", {"html": True}).enable("table").render(card)
    assert "<table>" in shown
    for tag in ("<script", "<img", "<a "):
        assert tag not in shown
    assert shown.count("<h1>") == 1
    table = [line for line in card.splitlines() if line.startswith("| note")]
    assert len(table) == 1
    assert len(re.findall(r"(?<!\\)\|", table[0])) == 3


@pytest.mark.parametrize(
    ("name", "config", "loader"),
    [
        ("config.json", {"is_encoder_decoder": True}, "import AutoModelForSeq2SeqLM"),
        ("config.json", {}, "import AutoModelForCausalLM"),
        ("adapter_config.json", {"task_type": "SEQ_2_SEQ_LM"}, "import AutoPeftModelForSeq2SeqLM"),
    ],
)
def test_an_encoder_decoder_is_loaded_as_one(
    build_run: RunBuilder, tmp_path: Path, name: str, config: dict[str, Any], loader: str
) -> None:
    run = build_run()
    (tmp_path / name).write_text(json.dumps(config), encoding="utf-8")
    manifest: Any = run.steps[3].manifest
    manifest.files = {name: FileEntry(sha256="0" * 64, size_bytes=1)}
    assert loader in model_card(run, run.steps[3], files=tmp_path)
