import io
import json
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from potstill.chat import Speaker, chat
from potstill.core.errors import DataError, ModelError
from potstill.models import LoadedModel

TokenChooser = Callable[[list[int]], int]


@pytest.fixture
def folders(tmp_path: Path, build_tiny_model: Callable[..., Any], tiny_tokenizer: Any) -> list[Path]:
    """Two tiny models' folders."""
    found = []
    for seed, name in enumerate(("one", "two")):
        build_tiny_model("llama", seed=seed).save_pretrained(tmp_path / name)
        tiny_tokenizer.save_pretrained(tmp_path / name)
        found.append(tmp_path / name)
    return found


@pytest.fixture
def speaker(tiny_llama: Any, tiny_tokenizer: Any) -> Speaker:
    return Speaker("tiny", LoadedModel(tiny_llama, tiny_tokenizer, "tiny"), system="Be brief.")


def _says(speaker: Speaker, monkeypatch: pytest.MonkeyPatch, *answers: str) -> list[list[int]]:
    """Make a speaker's model say the answers in turn, ending each turn; the prompts it was given, as ids."""
    import torch

    prompts: list[list[int]] = []
    waiting = list(answers)

    def generate(input_ids: Any, streamer: Any, generation_config: Any, **_: Any) -> None:
        prompts.append(input_ids[0].tolist())
        streamer.put(input_ids)
        ids = speaker.renderer.tokenizer(waiting.pop(0), add_special_tokens=False)["input_ids"]
        for token in [*ids[: generation_config.max_new_tokens], speaker.renderer.end_of_turn_ids[0]]:
            streamer.put(torch.tensor([token]))
        streamer.end()

    monkeypatch.setattr(speaker.model, "generate", generate)
    return prompts


def _ask(speaker: Speaker, question: str, **options: Any) -> str:
    heard: list[str] = []
    options = {"max_new_tokens": 40, "temperature": 0.0, "on_text": heard.append, **options}
    answer = speaker.answer(question, **options)
    assert "".join(heard).startswith(answer)
    return answer


def test_prompts_are_rendered_as_in_training_with_the_turns_before(
    speaker: Speaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = _says(speaker, monkeypatch, "It is 7.", "It is 8.")
    assert _ask(speaker, "What is 3 + 4?") == "It is 7."
    _ask(speaker, "And one more?")
    conversation = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is 3 + 4?"},
        {"role": "assistant", "content": "It is 7."},
        {"role": "user", "content": "And one more?"},
    ]
    assert prompts == [
        speaker.renderer.prompt_ids(conversation[:2]),
        speaker.renderer.prompt_ids(conversation),
    ]


def test_reasoning_is_shown_and_left_out_of_the_history(
    speaker: Speaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    _says(speaker, monkeypatch, "<think>\n3 + 4 = 7\n</think>\n7")
    assert "3 + 4 = 7" in _ask(speaker, "What is 3 + 4?")
    assert speaker.messages[-1] == {"role": "assistant", "content": "7"}


def test_reset_keeps_only_the_system_prompt(speaker: Speaker, monkeypatch: pytest.MonkeyPatch) -> None:
    _says(speaker, monkeypatch, "7")
    _ask(speaker, "What is 3 + 4?")
    speaker.reset()
    assert speaker.messages == [{"role": "system", "content": "Be brief."}]


def test_ctrl_c_ends_the_answer_and_keeps_what_was_said(
    speaker: Speaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    def generate(input_ids: Any, streamer: Any, **_: Any) -> None:
        streamer.put(input_ids)
        for token in speaker.renderer.tokenizer("The answer is long ", add_special_tokens=False)["input_ids"]:
            streamer.put(torch.tensor([token]))
        raise KeyboardInterrupt

    monkeypatch.setattr(speaker.model, "generate", generate)
    heard: list[str] = []
    speaker.answer("Why?", max_new_tokens=40, temperature=0.0, on_text=heard.append)
    assert "".join(heard).startswith("The answer is")
    assert heard[-1] == " [stopped]"
    assert speaker.messages[-1]["content"].startswith("The answer is")


def test_the_real_model_stops_at_its_end_of_turn_and_at_the_limit(speaker: Speaker) -> None:
    import torch

    text = _ask(speaker, "Why?", max_new_tokens=5)
    ids = speaker.renderer.prompt_ids([*speaker.messages[:1], {"role": "user", "content": "Why?"}])
    with torch.no_grad():
        logits_V = speaker.loaded.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
        expected = logits_V[: speaker.loaded.vocabulary_size].argmax()
    speaker.stop_ids = {int(expected)}
    speaker.reset()
    assert _ask(speaker, "Why?", max_new_tokens=5) == ""
    assert text != ""


def test_a_conversation_past_the_context_says_so_and_stays_as_it_was(speaker: Speaker) -> None:
    before = list(speaker.messages)
    with pytest.raises(DataError, match="context holds 512"):
        _ask(speaker, "why " * 600)
    assert speaker.messages == before


def test_piped_lines_are_answered_one_by_one(folders: list[Path]) -> None:
    output = io.StringIO()
    questions = io.StringIO("What is 1 + 1?\n\n/reset\n/nonsense\nWhat is 2 + 2?\n/quit\nnever read\n")
    chat(str(folders[0]), max_new_tokens=4, questions=questions, output=output)
    text = output.getvalue()
    assert text.count("(the conversation starts anew)") == 1
    assert text.count("/quit ends it") == 1
    assert questions.read() == "never read\n"
    assert len(text.splitlines()) >= 4


def test_two_models_answer_under_names_that_tell_them_apart(folders: list[Path]) -> None:
    output = io.StringIO()
    chat(
        str(folders[0]),
        against=str(folders[1]),
        max_new_tokens=4,
        questions=io.StringIO("Why?\n"),
        output=output,
    )
    assert output.getvalue().startswith("one> ")
    assert "\ntwo> " in output.getvalue()


def test_a_question_past_the_context_does_not_end_the_conversation(folders: list[Path]) -> None:
    output = io.StringIO()
    chat(str(folders[0]), max_new_tokens=3, questions=io.StringIO("why " * 600 + "\nWhy?\n"), output=output)
    assert "/reset starts anew]" in output.getvalue().splitlines()[0]
    assert len(output.getvalue().splitlines()) >= 2


def test_the_handler_of_ctrl_c_is_put_back(folders: list[Path]) -> None:
    before = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        chat(str(folders[0]), questions=io.StringIO(""), output=io.StringIO())
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_model_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="nowhere"):
        chat(str(tmp_path / "nowhere"), questions=io.StringIO(""), output=io.StringIO())


def test_side_by_side_answers_stand_in_two_columns(
    folders: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    lines = iter(["Why?", "/quit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    monkeypatch.setenv("COLUMNS", "100")
    output = Terminal()
    chat(str(folders[0]), against=str(folders[1]), max_new_tokens=4, questions=Terminal(), output=output)
    plain = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", output.getvalue())
    head = next(line for line in plain.splitlines() if "one" in line and "two" in line)
    assert head.index("one") < 10
    assert head.index("two") >= 45


def test_the_models_own_penalties_do_not_change_what_it_says(folders: list[Path]) -> None:
    plain, penalised = io.StringIO(), io.StringIO()
    chat(str(folders[0]), max_new_tokens=12, questions=io.StringIO("Why?\n"), output=plain)
    path = folders[0] / "generation_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**config, "repetition_penalty": 5.0}), encoding="utf-8")
    chat(str(folders[0]), max_new_tokens=12, questions=io.StringIO("Why?\n"), output=penalised)
    assert plain.getvalue() == penalised.getvalue()
