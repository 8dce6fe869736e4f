"""The transformers engine: local batched decoding, for teachers and for evaluation alike.

Shapes: B rows of a batch, T positions, V vocabulary.
"""

import asyncio
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from potstill.core.alternatives import Alternatives
from potstill.core.errors import DataError, EngineError, ModelError
from potstill.data.chat import Renderer, check_prompt_length
from potstill.data.responses import response_text
from potstill.models import LoadedModel, TransformersModel, decoder_start_id, ending_ids, load, plain_model
from potstill.teachers.protocol import Answer, Capabilities, Request, RequestError

if TYPE_CHECKING:
    import torch
    from transformers import GenerationConfig

__all__ = ["TransformersTeacher", "context_tokens", "generate_batch", "generation_inputs", "local_batch"]

_CPU_BATCH, _GPU_BATCH = 32, 64
_GATHER_S = 0.02


def generate_batch(
    loaded: LoadedModel,
    renderer: Renderer,
    prompts_token_ids: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seeds: Sequence[int] | None = None,
    top_logprobs: int = 0,
    stop: threading.Event | None = None,
) -> list[Answer]:
    """One response a prompt, decoded together in one left-padded batch.

    Temperature 0 takes the likeliest token. Otherwise each row draws with its own seed, so that a row's
    response does not depend on the rows beside it, beyond what another batch shape changes in the last bits
    of the logits. Log-probabilities are at temperature 1, over the tokenizer's vocabulary, of the tokens
    themselves and of the `top_logprobs` likeliest in each place. A row ends at an end-of-turn or end-of-text
    token ("stop"), which is left out, or after `max_new_tokens` or at the end of the model's context
    ("length"). `stop` ends every row at once. Raises DataError for a prompt that leaves
    no room in the context.
    """
    if temperature > 0 and (seeds is None or len(seeds) != len(prompts_token_ids)):
        raise ValueError("sampling needs one seed a prompt")
    context = context_tokens(loaded)
    start = decoder_start_id(loaded.model.config)
    rows_by_room: dict[tuple[int, int], list[int]] = {}
    for row, ids in enumerate(prompts_token_ids):
        room = max_new_tokens
        if context is not None:
            check_prompt_length(len(ids), context)
            room = min(room, context - len(ids))
        begun = 0 if start is None else len(ids) - ids.index(start)
        rows_by_room.setdefault((room, begun), []).append(row)
    decoding = _Decoding(loaded, renderer, temperature, top_p, top_logprobs, stop)
    answers: dict[int, Answer] = {}
    # Rows whose context ends earlier make a batch of their own: learned positions do not exist beyond it. So
    # do those of which an encoder-decoder has as many tokens of the response already.
    for (room, _), rows in rows_by_room.items():
        prompts = [list(prompts_token_ids[row]) for row in rows]
        answers.update(
            zip(rows, decoding.run(prompts, [seeds[row] for row in rows] if seeds else [], room), strict=True)
        )
    return [answers[row] for row in range(len(prompts_token_ids))]


def generation_inputs(
    model: Any, prompts: Sequence[Sequence[int]], padding_id: int
) -> tuple[dict[str, Any], int]:
    """What transformers' generate() takes for prompts' token ids, and how many ids its output begins with.

    Prompts are padded on the left. An encoder-decoder's are parted where its decoder's input begins, which is
    of one length for all.
    """
    import torch
    from transformers.cache_utils import DynamicCache, EncoderDecoderCache

    start = decoder_start_id(model.config)
    sources = [ids if start is None else ids[: ids.index(start)] for ids in prompts]
    width = max(map(len, sources))
    ids_by_name = {
        "input_ids": [[padding_id] * (width - len(ids)) + [*ids] for ids in sources],
        "attention_mask": [[0] * (width - len(ids)) + [1] * len(ids) for ids in sources],
    }
    if start is not None:
        begun = [[*ids[len(source) :]] for ids, source in zip(prompts, sources, strict=True)]
        ids_by_name["decoder_input_ids"], width = begun, len(begun[0])
    inputs: dict[str, Any] = {
        name: torch.tensor(ids, device=model.device) for name, ids in ids_by_name.items()
    }
    if start is not None:  # transformers' own has as many layers as the encoder
        inputs["past_key_values"] = EncoderDecoderCache(DynamicCache(), DynamicCache())
    return inputs, width


def context_tokens(loaded: LoadedModel) -> int | None:
    """How many tokens the model was made for, prompt and response together; None where it does not say."""
    tokens = getattr(loaded.model.config.get_text_config(), "max_position_embeddings", None)
    return None if tokens is None else int(tokens)


class _Decoding:
    """What is the same for every batch of one call."""

    def __init__(
        self,
        loaded: LoadedModel,
        renderer: Renderer,
        temperature: float,
        top_p: float,
        top_logprobs: int,
        stop: threading.Event | None,
    ) -> None:
        self.loaded, self.renderer = loaded, renderer
        self.temperature, self.top_p, self.top_logprobs, self.stop = temperature, top_p, top_logprobs, stop
        # generate() of a PEFT model insists on a generation config of its own; the model inside keeps its
        # adapter.
        self.model = plain_model(loaded.model)
        self.stop_ids = ending_ids(self.model, loaded.tokenizer, renderer.end_of_turn_ids)

    def run(self, prompts: list[list[int]], seeds: Sequence[int], room: int) -> list[Answer]:
        """Decode one batch of at most `room` new tokens a row."""
        import torch
        from transformers import GenerationConfig

        padding_id = min(self.stop_ids)
        inputs, width = generation_inputs(self.model, prompts, padding_id)
        drawn_BT = _uniform_draws(seeds, room) if self.temperature > 0 else None
        chosen_logprobs: list[torch.Tensor] = []
        likeliest: list[tuple[torch.Tensor, torch.Tensor]] = []

        def choose(ids_BT: "torch.Tensor", logits_BV: "torch.Tensor") -> "torch.Tensor":
            known_BV = logits_BV[:, : self.loaded.vocabulary_size].float()
            step = ids_BT.shape[1] - width
            if drawn_BT is None:
                chosen_B1 = known_BV.argmax(-1, keepdim=True)
            else:
                column_B = drawn_BT[:, min(step, room - 1)].to(known_BV.device)
                chosen_B1 = _draw(known_BV / self.temperature, self.top_p, column_B)
            log_probs_BV = known_BV.log_softmax(-1)
            chosen_logprobs.append(log_probs_BV.gather(1, chosen_B1).cpu())
            if self.top_logprobs:
                top_BK = log_probs_BV.topk(self.top_logprobs)
                likeliest.append((top_BK.indices.cpu(), top_BK.values.cpu()))
            return torch.full_like(logits_BV, -torch.inf).scatter_(1, chosen_B1, 0.0)

        def stopped(ids_BT: "torch.Tensor", scores: object, **_: object) -> "torch.Tensor":
            done = self.stop is not None and self.stop.is_set()
            return torch.full((len(ids_BT),), done, dtype=torch.bool, device=ids_BT.device)

        config = GenerationConfig(
            do_sample=False,
            use_cache=True,
            max_new_tokens=room,
            eos_token_id=sorted(self.stop_ids),
            pad_token_id=padding_id,
            decoder_start_token_id=decoder_start_id(self.model.config),
        )
        with torch.inference_mode(), _only_config(self.model, config), _contiguous_states(self.model):
            output_BT = self.model.generate(
                **inputs,
                generation_config=config,
                logits_processor=[choose],
                stopping_criteria=[stopped],
            )
        logprobs_BT = torch.cat(chosen_logprobs, dim=1).tolist()
        answers = [
            self._answer(prompt, ids, logprobs)
            for prompt, ids, logprobs in zip(prompts, output_BT[:, width:].tolist(), logprobs_BT, strict=True)
        ]
        if self.top_logprobs:
            for row, answer in enumerate(answers):
                assert answer.response_tokens is not None
                places = (
                    list(zip(ids_BK[row].tolist(), log_probs_BK[row].tolist(), strict=True))
                    for ids_BK, log_probs_BK in likeliest[: answer.response_tokens]
                )
                answers[row] = replace(answer, alternatives=Alternatives.of(places, as_ids=True))
        return answers

    def _answer(self, prompt: list[int], new_ids: list[int], logprobs: list[float]) -> Answer:
        end = next((at for at, token in enumerate(new_ids) if token in self.stop_ids), None)
        ids = new_ids[:end]
        # An encoder-decoder's response is a text of its own, of which the decoder may have been given some.
        start = decoder_start_id(self.model.config)
        before = prompt if start is None else prompt[prompt.index(start) + 1 :]
        return Answer(
            response=response_text(self.loaded.tokenizer, before, ids),
            finish_reason="length" if end is None else "stop",
            prompt_token_ids=prompt,
            response_token_ids=ids,
            logprobs=logprobs[: len(ids)],
            tokenizer=self.renderer.tokenizer_hash,
            prompt_tokens=len(prompt),
            response_tokens=len(ids) + (end is not None),
        )


@contextmanager
def _only_config(model: Any, config: "GenerationConfig") -> Iterator[None]:
    """Keep generate() from filling in the penalties and filters of the model's own generation config."""
    own, model.generation_config = model.generation_config, config
    try:
        yield
    finally:
        model.generation_config = own


@contextmanager
def _contiguous_states(model: Any) -> Iterator[None]:
    """Give the output head contiguous states.

    Of the last positions of longer rows, a view with gaps, torch would copy the head's whole weight a row.
    """
    head = model.get_output_embeddings()
    with head.register_forward_pre_hook(lambda _, states: (states[0].contiguous(), *states[1:])):
        yield


def _uniform_draws(seeds: Sequence[int], steps: int) -> "torch.Tensor":
    """[B, steps] numbers in [0, 1): each row's from its own seed."""
    import torch

    rows = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        rows.append(torch.rand(steps, dtype=torch.float64, generator=generator))
    return torch.stack(rows)


def _draw(logits_BV: "torch.Tensor", top_p: float, drawn_B: "torch.Tensor") -> "torch.Tensor":
    """[B, 1] ids: where each row's number falls in its cumulative distribution within the top-p nucleus."""
    import torch

    probabilities_BV = logits_BV.softmax(-1)
    if top_p < 1.0:
        sorted_BV, order_BV = probabilities_BV.sort(-1, descending=True)
        beyond_BV = sorted_BV.cumsum(-1) - sorted_BV >= top_p
        probabilities_BV = torch.zeros_like(sorted_BV).scatter_(
            1, order_BV, sorted_BV.masked_fill(beyond_BV, 0.0)
        )
    cumulative_BV = probabilities_BV.cumsum(-1, dtype=torch.float64)
    target_B1 = drawn_B[:, None] * cumulative_BV[:, -1:]
    return torch.searchsorted(cumulative_BV, target_B1, right=True).clamp_(max=logits_BV.shape[1] - 1)


class TransformersTeacher:
    """Requests that arrive together are decoded in one batch, in a thread beside the event loop.

    It is cut into pieces where memory runs out, as all later ones are then.
    """

    def __init__(self, settings: TransformersModel, *, say: Callable[[str], None] | None = None) -> None:
        from potstill.scoring import Pieces

        def more(pieces: int) -> None:
            if say is not None:
                say(f"out of memory: batches are decoded in {pieces} pieces from here on")

        self._pieces = Pieces(more=more)
        self._loaded = load(settings, say=say)
        self.renderer = Renderer(self._loaded.tokenizer)
        self.identity = self._loaded.identity
        self.capabilities = Capabilities(
            "token_ids",
            token_ids=True,
            logprobs=self._loaded.vocabulary_size,
            full_logits=True,
            deterministic=False,
            logprob_temperature=1.0,
        )
        self.concurrency = local_batch(self._loaded.model.device)
        self.sampling: dict[str, Any] = {}
        self._waiting: list[tuple[Request, asyncio.Future[Answer]]] = []
        self._stop = threading.Event()
        self._serving: asyncio.Task[None] | None = None

    async def answer(self, request: Request) -> Answer:
        """The response to the request's token ids; it waits for its batch."""
        assert request.prompt_token_ids is not None, "the transformers engine is asked with token ids"
        context = context_tokens(self._loaded)
        if context is not None:
            try:
                check_prompt_length(len(request.prompt_token_ids), context)
            except DataError as error:
                raise RequestError(
                    error.what, blames_row=True, expected=error.expected, mend=error.mend
                ) from error
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._waiting.append((request, future))
        if self._serving is None or self._serving.done():
            self._serving = asyncio.create_task(self._serve())
        return await future

    async def _serve(self) -> None:
        """Decode batches until nobody waits."""
        while self._waiting:
            gathered = 0
            while gathered < len(self._waiting):
                gathered = len(self._waiting)
                await asyncio.sleep(_GATHER_S)
            batch = self._next_batch()
            if not batch:
                continue
            found = await asyncio.to_thread(self._decode_or_error, [request for request, _ in batch])
            for number, (_, future) in enumerate(batch):
                if future.done():  # its asker has gone
                    continue
                if isinstance(found, EngineError):
                    future.set_exception(found)
                else:
                    future.set_result(found[number])

    def _next_batch(self) -> list[tuple[Request, "asyncio.Future[Answer]"]]:
        """Those waiting that can be decoded together with the first."""
        waiting = [(request, future) for request, future in self._waiting if not future.done()]
        kinds = [_kind(request) for request, _ in waiting]
        self._waiting = [one for one, kind in zip(waiting, kinds, strict=True) if kind != kinds[0]]
        return [one for one, kind in zip(waiting, kinds, strict=True) if kind == kinds[0]]

    def _decode_or_error(self, requests: list[Request]) -> list[Answer] | EngineError:
        try:
            answers = list(self._pieces.run(self._decode, requests, _too_large))
        except ModelError as error:
            return EngineError(error.what, where="transformers engine", mend=error.mend)
        except Exception as error:  # torch and transformers raise what they like; all of the batch hears it
            return EngineError(
                f"decoding a batch of {len(requests)} failed: {type(error).__name__}: {error}",
                where="transformers engine",
                mend="lower `concurrency`, the rows at once; if it fails again, the message is torch's own",
            )
        if self._stop.is_set():
            return EngineError("closed while it decoded")  # what there is was cut off
        return answers

    def _decode(self, requests: Sequence[Request]) -> list[Answer]:
        first = requests[0]
        answers = generate_batch(
            self._loaded,
            self.renderer,
            [request.prompt_token_ids or [] for request in requests],
            max_new_tokens=first.max_new_tokens,
            temperature=first.temperature,
            top_p=first.top_p,
            seeds=[request.seed for request in requests],
            top_logprobs=_top_logprobs(first),
            stop=self._stop,
        )
        return [
            answer if request.logprobs else replace(answer, logprobs=None)
            for request, answer in zip(requests, answers, strict=True)
        ]

    async def close(self) -> None:
        """End the batch under way and forget who waits."""
        self._waiting.clear()
        self._stop.set()
        if self._serving is not None:
            await self._serving


def local_batch(device: "torch.device") -> int:
    """Answers that are decoded at once on a device by default."""
    return _CPU_BATCH if device.type == "cpu" else _GPU_BATCH


def _too_large(request: Request) -> ModelError:
    tokens = len(request.prompt_token_ids or []) + request.max_new_tokens
    return ModelError(
        f"an answer of up to {tokens:,} tokens, prompt included, does not fit into memory",
        mend="lower `max_new_tokens`, or use a machine or device with more memory",
    )


def _kind(request: Request) -> tuple[float, float, int, int]:
    return request.temperature, request.top_p, request.max_new_tokens, _top_logprobs(request)


def _top_logprobs(request: Request) -> int:
    return request.logprobs if request.logprobs is not None and request.logprobs > 1 else 0
