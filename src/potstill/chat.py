"""Talk to a student in the terminal, and hear another model's answer beside it."""

import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from potstill.core.errors import DataError
from potstill.data.chat import Renderer, check_prompt_length, split_reasoning
from potstill.models import LoadedModel, TransformersModel, decoder_start_id, ending_ids, load, plain_model
from potstill.teachers.transformers import context_tokens, generation_inputs

__all__ = ["Speaker", "chat"]

_SIDE_BY_SIDE_COLUMNS = 90
_HELP = "Type a question. /reset forgets the conversation, /quit ends it, Ctrl-C stops an answer."


class Speaker:
    """A model with its side of a conversation. Prompts are rendered as in training."""

    def __init__(self, name: str, loaded: LoadedModel, *, system: str | None = None) -> None:
        self.name, self.loaded, self.system = name, loaded, system
        self.renderer = Renderer(loaded.tokenizer)
        # A PEFT model's generate() insists on a config of its own; the model inside keeps its adapter.
        self.model = plain_model(loaded.model)
        self.stop_ids = ending_ids(self.model, loaded.tokenizer, self.renderer.end_of_turn_ids)
        self.messages: list[dict[str, str]] = []
        self.reset()

    def reset(self) -> None:
        """Forget the conversation, keep the system prompt."""
        self.messages = [] if self.system is None else [{"role": "system", "content": self.system}]

    def answer(
        self, question: str, *, max_new_tokens: int, temperature: float, on_text: Callable[[str], None]
    ) -> str:
        """The answer to one more question; `on_text` hears it piece by piece.

        Ends at the end of turn or after `max_new_tokens`. Ctrl-C ends it early and keeps what was said. What
        the model reasoned is not part of the history, as in its training. Raises DataError where the
        conversation has outgrown the context; the question is then not part of it.
        """
        asked = [*self.messages, {"role": "user", "content": question}]
        prompt_ids = self.renderer.prompt_ids(asked)
        room, length = max_new_tokens, context_tokens(self.loaded)
        if length is not None:
            check_prompt_length(len(prompt_ids), length)
            room = min(room, length - len(prompt_ids))
        text = self._generate(prompt_ids, room, temperature, on_text)
        answer = split_reasoning(self.renderer.read_response(asked, text))[1]
        self.messages = [*asked, {"role": "assistant", "content": answer}]
        return text

    def _generate(
        self, prompt_ids: list[int], max_new_tokens: int, temperature: float, on_text: Callable[[str], None]
    ) -> str:
        import torch
        from transformers import GenerationConfig, TextStreamer

        pieces: list[str] = []

        stop_ids, vocabulary_size = self.stop_ids, self.loaded.vocabulary_size

        class Streamer(TextStreamer):  # type: ignore[misc]  # transformers is not typed
            def put(self, value: torch.Tensor) -> None:
                if self.next_tokens_are_prompt or int(value[-1]) not in stop_ids:
                    super().put(value)

            def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
                pieces.append(text)
                on_text(text)

        sampling: dict[str, Any] = {"do_sample": False}
        if temperature > 0:
            sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}

        def known_ids(ids_BT: torch.Tensor, logits_BV: torch.Tensor) -> torch.Tensor:
            logits_BV[:, vocabulary_size:] = -torch.inf  # rows that only pad the head
            return logits_BV

        config = GenerationConfig(
            max_new_tokens=max_new_tokens,
            eos_token_id=sorted(stop_ids),
            pad_token_id=min(stop_ids),
            decoder_start_token_id=decoder_start_id(self.model.config),
            **sampling,
        )
        # generate() would fill in the penalties of the model's own config, which training knew nothing of.
        self.model.generation_config = config
        inputs, _ = generation_inputs(self.model, [prompt_ids], min(stop_ids))
        streamer = Streamer(self.loaded.tokenizer, skip_prompt=True, skip_special_tokens=True)
        try:
            with torch.inference_mode():
                self.model.generate(
                    **inputs,
                    generation_config=config,
                    logits_processor=[known_ids],
                    streamer=streamer,
                )
        except KeyboardInterrupt:
            on_text(" [stopped]")
        return "".join(pieces).strip()


def chat(
    model: str,
    *,
    against: str | None = None,
    system: str | None = None,
    max_new_tokens: int = 512,
    temperature: float = 0.0,
    questions: IO[str] | None = None,
    output: IO[str] | None = None,
) -> None:
    """Talk to a model until /quit or the end of input; `against` answers every question as well.

    Models are step folders, model folders, .gguf files, hub ids or embedded names. On a terminal answers
    stream, side by side where it is wide enough; piped, each line of `questions` is a question and the
    answers are plain text.
    """
    questions, output = questions or sys.stdin, output or sys.stdout
    interactive = questions.isatty() and output.isatty()
    places = [model] if against is None else [model, against]
    names = _names(places)
    speakers = []
    for name, place in zip(names, places, strict=True):
        if interactive:
            print(f"loading {name} ...", file=output, flush=True)
        speakers.append(Speaker(name, load(TransformersModel(path=place)), system=system))
    if interactive:
        print(_HELP, file=output)

    def answer(speaker: Speaker, question: str, on_text: Callable[[str], None]) -> None:
        try:
            speaker.answer(question, max_new_tokens=max_new_tokens, temperature=temperature, on_text=on_text)
        except DataError as error:
            on_text(f"[{error.what}; /reset starts anew]")

    wide = shutil.get_terminal_size().columns >= _SIDE_BY_SIDE_COLUMNS
    show = _answer_side_by_side if interactive and wide and len(speakers) > 1 else _answer_in_turn
    with _breaking_off_answers():
        for line in _asked(questions, output, interactive=interactive):
            if line == "/quit":
                break
            if line.startswith("/"):
                print(_command(line, speakers), file=output, flush=True)
            else:
                show(speakers, line, answer, output)


def _command(line: str, speakers: list[Speaker]) -> str:
    """Carry out a command other than /quit; what there is to say about it."""
    if line != "/reset":
        return _HELP
    for speaker in speakers:
        speaker.reset()
    return "(the conversation starts anew)"


def _names(places: list[str]) -> list[str]:
    """Short names for the models: the last parts of their places, as far back as tells them apart."""
    parts = [Path(place).parts or (place,) for place in places]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(one[-length:]) for one in parts]
        if len(set(names)) == len(names):
            return names
    return places


def _asked(questions: IO[str], output: IO[str], *, interactive: bool) -> Iterator[str]:
    """The questions, stripped; empty lines are passed over."""
    while True:
        try:
            # input() brings line editing; it reads standard input, which is what a terminal is.
            line = input("\nyou> ") if interactive else questions.readline()
        except (EOFError, KeyboardInterrupt):
            print(file=output)
            return
        if not interactive and not line:
            return
        if line.strip():
            yield line.strip()


_Answer = Callable[[Speaker, str, Callable[[str], None]], None]


def _answer_in_turn(speakers: list[Speaker], question: str, answer: _Answer, output: IO[str]) -> None:
    def on_text(text: str) -> None:
        print(text, end="", file=output, flush=True)

    for speaker in speakers:
        if len(speakers) > 1:
            print(f"{speaker.name}> ", end="", file=output, flush=True)
        answer(speaker, question, on_text)
        print(file=output, flush=True)


def _answer_side_by_side(speakers: list[Speaker], question: str, answer: _Answer, output: IO[str]) -> None:
    from rich.console import Console
    from rich.live import Live

    console = Console(file=output, highlight=False)
    texts = {speaker.name: "" for speaker in speakers}
    # While it grows, more text than the screen holds is cut; the whole is printed in the end.
    with Live(console=console, auto_refresh=False, transient=True) as live:
        for speaker in speakers:

            def on_text(text: str, name: str = speaker.name) -> None:
                texts[name] += text
                live.update(_columns(texts), refresh=True)

            answer(speaker, question, on_text)
    console.print(_columns(texts))


def _columns(texts: dict[str, str]) -> Any:
    from rich.table import Table
    from rich.text import Text

    table = Table(expand=True, show_edge=False, pad_edge=False)
    for name in texts:
        table.add_column(Text(name), ratio=1, overflow="fold")
    table.add_row(*(Text(text.strip()) for text in texts.values()))
    return table


@contextmanager
def _breaking_off_answers() -> Iterator[None]:
    """Ctrl-C raises KeyboardInterrupt at once while a conversation goes on."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
