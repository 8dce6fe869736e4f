"""Encoder-decoders beside other models: they answer, are talked to, examined, selected for and exported."""

import copy
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from potstill.chat import chat
from potstill.core.errors import ModelError
from potstill.core.records import RECORDS_FILE, Record, read_records
from potstill.data.chat import Renderer
from potstill.evaluate import EvaluateSettings
from potstill.evaluate import run as run_evaluate
from potstill.models import LoadedModel, TransformersModel, is_encoder_decoder, load
from potstill.select import SelectSettings
from potstill.select import run as run_select
from potstill.student import InitSettings
from potstill.student import run as run_init
from potstill.teachers.transformers import generate_batch

from ..rows import write_rows

QUESTIONS = ["What is 3 + 4?", "What is 12 + 7 - 30 + 1?", "3?"]


def asked(question: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}]


@pytest.fixture(params=("t5", "t5_1_1", "mt5"))
def loaded(request: pytest.FixtureRequest, build_t5_folder: Callable[..., Path]) -> LoadedModel:
    folder = build_t5_folder(request.param)
    return load(TransformersModel(path=str(folder), device="cpu", dtype="float32"))


@pytest.fixture
def t5(build_t5_folder: Callable[..., Path]) -> TransformersModel:
    return TransformersModel(path=str(build_t5_folder("t5")), device="cpu", dtype="float32")


@pytest.fixture
def llama(tiny_model_folder: Path) -> TransformersModel:
    return TransformersModel(path=str(tiny_model_folder), device="cpu", dtype="float32")


# --- decoding


def test_a_batch_gives_what_each_prompt_gives_alone_and_what_a_loop_over_whole_passes_gives(
    loaded: LoadedModel,
) -> None:
    renderer = Renderer(loaded.tokenizer)
    prompts = [renderer.prompt_ids(asked(question)) for question in QUESTIONS]
    together = generate_batch(loaded, renderer, prompts, max_new_tokens=6)
    for question, prompt, answer in zip(QUESTIONS, prompts, together, strict=True):
        [alone] = generate_batch(loaded, renderer, [prompt], max_new_tokens=6)
        assert alone.response_token_ids == answer.response_token_ids
        source, written, logprobs = torch.tensor([prompt[:-1]]), [0], []
        assert loaded.tokenizer(question).input_ids == prompt[:-1]
        while len(written) <= 6 and written[-1] != 1:
            with torch.no_grad():
                logits = loaded.model(input_ids=source, decoder_input_ids=torch.tensor([written])).logits
            known = logits[0, -1, : loaded.vocabulary_size].log_softmax(-1)
            written.append(int(known.argmax()))
            logprobs.append(float(known.max()))
        expected = written[1:-1] if written[-1] == 1 else written[1:]
        assert answer.response_token_ids == expected
        assert answer.logprobs == pytest.approx(logprobs[: len(expected)], abs=1e-4)
        assert answer.response == loaded.tokenizer.decode(expected)


def test_a_decoder_deeper_than_its_encoder_writes_as_well(build_tiny_t5: Any, t5_tokenizer: Any) -> None:
    model = build_tiny_t5(num_layers=1, num_decoder_layers=3)
    tokenizer = copy.deepcopy(t5_tokenizer)
    tokenizer.chat_template = "{{ messages[0]['content'] }}</s><pad>"
    loaded = LoadedModel(model, tokenizer, "")
    [answer] = generate_batch(loaded, Renderer(tokenizer), [[5, 6, 1, 0]], max_new_tokens=4)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[5, 6, 1]]), decoder_input_ids=torch.tensor([[0]])).logits
    assert (answer.response_token_ids or [1])[0] == int(logits[0, -1, : loaded.vocabulary_size].argmax())


def test_a_begun_response_is_gone_on_with(loaded: LoadedModel) -> None:
    renderer = Renderer(loaded.tokenizer)
    prompts = [renderer.prompt_ids(asked(question)) for question in QUESTIONS]
    whole = generate_batch(loaded, renderer, prompts, max_new_tokens=6)
    begun = [
        [*prompt, *(answer.response_token_ids or [])[: number + 1]]
        for number, (prompt, answer) in enumerate(zip(prompts, whole, strict=True))
    ]
    rest = generate_batch(loaded, renderer, begun, max_new_tokens=6)
    for number, (one, other) in enumerate(zip(whole, rest, strict=True)):
        ids = (one.response_token_ids or [])[number + 1 :]
        assert (other.response_token_ids or [])[: len(ids)] == ids
        if ids:
            said = loaded.tokenizer.decode((one.response_token_ids or [])[: number + 1])
            assert (said + other.response).startswith(one.response)


def test_sampled_answers_are_those_of_their_own_seed(loaded: LoadedModel) -> None:
    renderer = Renderer(loaded.tokenizer)
    prompts = [renderer.prompt_ids(asked(question)) for question in QUESTIONS]
    options: dict[str, Any] = {"max_new_tokens": 6, "temperature": 1.0}
    together = generate_batch(loaded, renderer, prompts, seeds=[1, 2, 3], **options)
    [alone] = generate_batch(loaded, renderer, prompts[1:2], seeds=[2], **options)
    assert alone.response_token_ids == together[1].response_token_ids


def test_chat_answers_question_after_question(t5: TransformersModel) -> None:
    output = io.StringIO()
    chat(t5.path, questions=io.StringIO("3 + 4?\n/reset\n3 + 4?\n"), output=output, max_new_tokens=6)
    first, _, second = output.getvalue().strip().split("\n")
    model = load(t5)
    renderer = Renderer(model.tokenizer)
    [answer] = generate_batch(model, renderer, [renderer.prompt_ids(asked("3 + 4?"))], max_new_tokens=6)
    assert first.strip() == second.strip() == answer.response.strip()


# --- steps that read and measure


def test_it_is_examined_beside_decoder_only_models_on_the_same_prompts(
    step_context: Any, traces: Any, t5: TransformersModel, llama: TransformersModel, tmp_path: Path
) -> None:
    import pyarrow.parquet as pq

    rows = [{"question": f"What is {n} + 1?", "answer": f"#### {n + 1}"} for n in range(4)]
    choices = [{"question": "3 + 4?", "choices": ["6", "7"], "answer": 1}]
    for name, given in (("sums", rows), ("choices", choices)):
        write_rows(tmp_path / f"{name}.jsonl", given)
    settings = EvaluateSettings.model_validate(
        {
            "do": "evaluate",
            "models": {"llama": "llama", "t5": "t5"},
            "teacher": "llama",
            "data": "traces:held_out",
            "tasks": {
                "sums": {"path": str(tmp_path / "sums.jsonl")},
                "choices": {"data": {"path": str(tmp_path / "choices.jsonl")}, "choose_by": "letter"},
            },
            "max_new_tokens": 6,
        }
    )
    context = step_context("evaluate", models={"llama": llama, "t5": t5}, data={"traces": [traces(20)]})
    result = run_evaluate(settings, context)
    scores = pq.read_table(context.folder / "scores.parquet").to_pylist()
    prompts = {name: [row["prompt"] for row in scores if row["model"] == name] for name in ("llama", "t5")}
    assert prompts["llama"] == prompts["t5"]
    assert len(prompts["t5"]) == 5
    held_out = pq.read_table(context.folder / "held_out.parquet").to_pylist()
    of_t5 = [row for row in held_out if row["model"] == "t5"]
    assert len(of_t5) == 4
    assert all(row["kl_nats"] is None and row["cross_entropy_nats"] > 0 for row in of_t5)
    assert "no KL" in json.dumps(result.metrics) + "\n".join(context.reporter.said)


def test_traces_are_selected_by_its_log_probabilities(
    step_context: Any, traces: Any, t5: TransformersModel
) -> None:
    from potstill.scoring import token_logprobs

    source = traces(name="scored")
    for record in read_records(source.folder / RECORDS_FILE):
        assert record.logprobs is None
    context = step_context("select", models={"student": t5, "teacher": t5}, data={"traces": [source]})
    settings = SelectSettings.model_validate(
        {
            "do": "select",
            "data": "traces",
            "student": "student",
            "teacher": "teacher",
            "keep": {"top": 0.5},
        }
    )
    run_select(settings, context)
    kept = list(read_records(context.folder / RECORDS_FILE))
    assert kept
    model = load(t5)
    renderer = Renderer(model.tokenizer)
    [logprobs] = token_logprobs(model, [renderer.without_end_of_turn(renderer.render(kept[0]))])
    found = next(value for name, value in kept[0].scores.items() if "student" in name)
    assert found == pytest.approx(float(logprobs.mean().exp()), rel=1e-3)


# --- making and handing out


def init_settings(**fields: Any) -> InitSettings:
    given = {"do": "init", "model": "base", "data": "traces", "samples": 4, "device": "cpu"}
    return InitSettings.model_validate({**given, **fields})


TINY = {
    "model_type": "t5",
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}


def test_a_new_one_is_made_with_the_tokenizer_of_a_decoder_only_model(
    step_context: Any, traces: Any, llama: TransformersModel
) -> None:
    context = step_context("init", models={"base": llama}, data={"traces": [traces()]})
    result = run_init(init_settings(method="from_config", config=TINY), context)
    assert "quality" not in result.metrics
    made = load(TransformersModel(path=str(context.folder)))
    prompt = Renderer(made.tokenizer).prompt_text(asked("3 + 4?"))
    assert prompt == "3 + 4?<|im_end|><|endoftext|>"
    assert is_encoder_decoder(context.folder)


def test_no_smaller_one_is_cut_out_of_it(step_context: Any, traces: Any, t5: TransformersModel) -> None:
    context = step_context("init", models={"base": t5}, data={"traces": [traces()]})
    with pytest.raises(ModelError, match="is an encoder-decoder, of which method prune makes no smaller one"):
        run_init(init_settings(layers=1), context)


def test_weights_in_four_bits_are_a_base_for_it(t5: TransformersModel) -> None:
    pytest.importorskip("bitsandbytes")
    packed = load(t5.model_copy(update={"quantize": "nf4"}))
    row = Renderer(packed.tokenizer).render(Record("p", asked("3 + 4?"), response="The answer is 7."))
    from potstill.scoring import token_logprobs

    [found], [plain] = token_logprobs(packed, [row]), token_logprobs(load(t5), [row])
    assert_close(found, plain, rtol=0.5, atol=2.0)
    assert (found - plain).abs().max() > 0
