"""vLLM in a process of its own: what it is asked for, how it ends, and what is said where it is not there."""

import asyncio
import json
import os
import re
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import psutil
import pytest

from potstill.core.errors import EngineError, ModelError
from potstill.core.settings import meaning
from potstill.teachers import Answer, Request, RequestError, VllmModel, check_teacher, open_teacher
from potstill.teachers.replicated import ReplicatedTeacher, vllm_copy
from potstill.teachers.vllm import VllmTeacher, _engine_arguments, _unpacked, scored_tokens
from potstill.teachers.vllm_child import _packed

from ...conftest import PADDED_VOCABULARY
from ...copies import CopiesHere
from ...served import VLLM_PYTHON, VLLM_SMALL, vllm_environment

GIB = 2**30
QUESTIONS = [[{"role": "user", "content": f"What is {number} + {number}?"}] for number in range(6)]


@pytest.fixture
def folder(tmp_path: Path, build_tiny_model: Callable[..., Any], tiny_tokenizer: Any) -> Path:
    # One head as wide as vLLM's kernels for CPUs take at least.
    build_tiny_model("llama", num_attention_heads=1, num_key_value_heads=1).save_pretrained(tmp_path / "tiny")
    tiny_tokenizer.save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


@pytest.fixture
def settings(folder: Path) -> VllmModel:
    return VllmModel(engine="vllm", path=str(folder))


def test_tokens_scored_at_once_take_a_gibibyte_whatever_the_vocabulary() -> None:
    assert scored_tokens(152_000) == 1009
    for vocabulary in (32_000, 128_256, 152_000, 262_144):
        assert 0.99 * GIB < 7 * vocabulary * scored_tokens(vocabulary) <= GIB
    assert scored_tokens(300) == 8192
    assert scored_tokens(10**8) == 64


def test_scoring_does_without_prefix_caching_and_bounds_what_is_scored_at_once(settings: VllmModel) -> None:
    scoring = _engine_arguments(settings, 152_000, scoring=True)
    assert scoring["enable_prefix_caching"] is False
    assert scoring["max_num_batched_tokens"] == 1009
    assert scoring["enable_chunked_prefill"] is True
    answering = _engine_arguments(settings, 152_000, scoring=False)
    assert answering["enable_prefix_caching"] is True
    assert "max_num_batched_tokens" not in answering
    for arguments in (scoring, answering):
        assert arguments["logprobs_mode"] == "raw_logprobs"
        assert arguments["max_logprobs"] == 152_000
        assert arguments["dtype"] == "bfloat16"
        assert arguments["trust_remote_code"] is False
        assert arguments["model"] == settings.path


def test_no_more_requests_are_scored_at_once_than_tokens(settings: VllmModel) -> None:
    found = _engine_arguments(settings, 10**8, scoring=True)
    assert found["max_num_seqs"] == found["max_num_batched_tokens"] == 64


def test_only_what_changes_answers_is_part_of_the_fingerprint(folder: Path, settings: VllmModel) -> None:
    more = {"python": "/opt/vllm/bin/python", "tensor_parallel_size": 4, "memory_share": 0.5, "slots": 8}
    same = VllmModel(engine="vllm", path=str(folder), dtype="float16", **more)
    assert meaning(same) == meaning(settings)
    for change in ({"engine_arguments": {"quantization": "fp8"}}, {"context_tokens": 64}, {"identity": "x"}):
        assert meaning(settings.model_copy(update=change)) != meaning(settings)
    assert meaning(settings)["content"] == {"identity": settings.as_transformers().content()["identity"]}


def test_a_copy_on_ray_is_spread_over_all_its_gpus_unless_a_number_is_stated(settings: VllmModel) -> None:
    replicas = CopiesHere()
    for gpus, spread in ((0.0, 1), (0.5, 1), (4.0, 4)):
        replicas.gpus = gpus
        assert vllm_copy(settings, replicas).tensor_parallel_size == spread
    stated = settings.model_copy(update={"tensor_parallel_size": 2})
    assert vllm_copy(stated, replicas).tensor_parallel_size == 2
    assert _engine_arguments(stated, 300, scoring=False)["tensor_parallel_size"] == 2


def test_copies_that_share_a_gpu_divide_its_memory_as_they_divide_it(settings: VllmModel) -> None:
    replicas = CopiesHere()
    for gpus, memory_share in ((0.0, 0.9), (0.25, 0.225), (0.5, 0.45), (1.0, 0.9), (4.0, 0.9)):
        replicas.gpus = gpus
        copy = vllm_copy(settings, replicas)
        found = _engine_arguments(copy, 300, scoring=False)["gpu_memory_utilization"]
        assert found == pytest.approx(memory_share)


def test_what_is_set_by_potstill_is_no_argument(folder: Path, settings: VllmModel) -> None:
    everything = settings.model_copy(update={"path": "organisation/name@main", "context_tokens": 64})
    for taken in _engine_arguments(everything, 300, scoring=True):
        with pytest.raises(ValueError, match=f"{taken} is set by potstill"):
            VllmModel(engine="vllm", path=str(folder), engine_arguments={taken: True})


def test_an_adapter_is_to_be_merged_first(folder: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(folder)}))
    model = VllmModel(engine="vllm", path=str(adapter))
    with pytest.raises(ModelError, match="this is an adapter"):
        VllmTeacher(model)
    problem, _ = check_teacher(model)
    assert problem is not None
    assert "`merge` step" in problem


def test_an_interpreter_without_vllm_is_told_what_to_install(settings: VllmModel) -> None:
    problem, _ = check_teacher(settings)
    assert problem is not None
    for told in (sys.executable, "pip install vllm", "`python`", "other releases of transformers"):
        assert told in problem
    with pytest.raises(EngineError, match="vLLM is not installed") as failure:
        VllmTeacher(settings)
    assert str(failure.value) == problem


def test_an_interpreter_that_is_not_there_is_named(settings: VllmModel) -> None:
    missing = settings.model_copy(update={"python": "/nowhere/bin/python"})
    problem, _ = check_teacher(missing)
    assert problem is not None
    assert "/nowhere/bin/python cannot be run (No such file or directory)" in problem
    with pytest.raises(EngineError, match="/nowhere/bin/python cannot be run"):
        VllmTeacher(missing)


def test_log_probabilities_arrive_as_they_were_sent() -> None:
    class Kept:
        start_indices, end_indices = [0, 0, 3], [0, 3, 4]
        token_ids, logprobs = [7, 300, 2, 5], [-0.5, -1.25, float("-inf"), -2.0]

    places = [{}, {7: -0.5, 300: -1.25, 2: float("-inf")}, {5: -2.0}]
    assert _unpacked(_packed(Kept())) == places
    assert _unpacked(b"") == []


@pytest.fixture
def stubbed(settings: VllmModel, stub_python: str) -> Callable[..., VllmModel]:
    """The tiny model for the stub, which conducts itself as stated."""

    def state(conduct: str = "answers", **more: Any) -> VllmModel:
        arguments = {"conduct": conduct, "vocabulary": PADDED_VOCABULARY, "together": 1, **more}
        return settings.model_copy(update={"python": stub_python, "engine_arguments": arguments})

    return state


def with_teacher(settings: VllmModel, use: Callable[[VllmTeacher], Any], **options: Any) -> Any:
    async def run() -> Any:
        teacher = VllmTeacher(settings, **options)
        try:
            return await use(teacher)
        finally:
            await teacher.close()

    return asyncio.run(run())


class Family:
    """The processes of the stub's group: each holds a pipe open until it has ended."""

    def __init__(self, path: Path) -> None:
        os.mkfifo(path)
        self.path, self.pipe = str(path), os.open(path, os.O_RDONLY | os.O_NONBLOCK)

    def ends(self, within_s: float = 20.0) -> bool:
        return bool(select.select([self.pipe], [], [], within_s)[0]) and os.read(self.pipe, 1) == b""


@pytest.fixture
def family(tmp_path: Path) -> Iterator[Family]:
    made = Family(tmp_path / "family")
    yield made
    os.close(made.pipe)


def test_answers_find_who_asked_in_whatever_order_they_come(stubbed: Callable[..., VllmModel]) -> None:
    settings = stubbed(together=len(QUESTIONS))
    assert check_teacher(settings) == (None, None)

    async def use(teacher: VllmTeacher) -> None:
        assert teacher.context_tokens == 512
        prompts = [teacher.renderer.prompt_ids(one) for one in QUESTIONS]
        requests = [
            Request([], ids, max_new_tokens=limit, logprobs=1)
            for ids, limit in zip(prompts, (3, 4, 5, 400, 400, 400), strict=True)
        ]
        likeliest = len(teacher.renderer.tokenizer) - 1  # no id that only pads the model's vocabulary
        assert likeliest < PADDED_VOCABULARY - 1
        for request, answer in zip(
            requests, await asyncio.gather(*map(teacher.answer, requests)), strict=True
        ):
            assert request.prompt_token_ids is not None
            expected = [likeliest, *reversed(request.prompt_token_ids)]
            ended = request.max_new_tokens == 400
            assert answer.finish_reason == ("stop" if ended else "length")
            assert answer.response_token_ids == expected[: request.max_new_tokens]
            assert answer.response_tokens == (len(expected) + 1 if ended else request.max_new_tokens)
            assert answer.logprobs == [-0.5 * place for place in range(len(answer.response_token_ids))]

    with_teacher(settings, use)


def test_log_probabilities_of_a_prompt_are_those_of_its_own_places(
    stubbed: Callable[..., VllmModel],
) -> None:
    async def use(teacher: VllmTeacher) -> None:
        places = await teacher.prompt_logprobs([1, 7, 9], 2)
        assert places == [{0: -1.0, 1: -2.0, 7: -9.0}, {0: -1.0, 1: -2.0, 9: -9.0}]

    with_teacher(stubbed(), use, scoring=True)


def test_a_refused_request_is_blamed_on_its_row_and_no_other(stubbed: Callable[..., VllmModel]) -> None:
    async def use(teacher: VllmTeacher) -> None:
        asked = (
            teacher.answer(Request([], ids, max_new_tokens=1)) for ids in ([5], [PADDED_VOCABULARY], [6])
        )
        first, refused, last = await asyncio.gather(*asked, return_exceptions=True)
        assert isinstance(first, Answer)
        assert isinstance(last, Answer)
        assert isinstance(refused, RequestError)
        assert refused.blames_row
        assert f"vLLM refused: Token id {PADDED_VOCABULARY} is out of vocabulary" in str(refused)

    with_teacher(stubbed(), use)


@pytest.mark.parametrize(
    ("conduct", "told"),
    [
        ("fails", "vLLM failed: RuntimeError: out of memory"),
        ("dies", "vLLM failed: its process ended; the last that it said: .*a kernel gave up"),
    ],
)
def test_an_engine_that_ends_fails_what_is_and_will_be_asked_with_the_reason(
    stubbed: Callable[..., VllmModel], family: Family, conduct: str, told: str
) -> None:
    async def use(teacher: VllmTeacher) -> None:
        asked = (teacher.answer(Request([], [id_])) for id_ in range(3))
        for failure in await asyncio.gather(*asked, return_exceptions=True):
            assert isinstance(failure, EngineError)
            assert not isinstance(failure, RequestError)
            assert re.search(told, str(failure))
        assert conduct == "dies" or family.ends()  # one that is killed leaves the others to `close`
        with pytest.raises(EngineError, match=told):
            await teacher.answer(Request([], [1]))

    with_teacher(stubbed(conduct, family=family.path), use)
    assert family.ends()


def test_who_asks_while_the_others_are_told_of_the_end_is_told_as_well(
    stubbed: Callable[..., VllmModel],
) -> None:
    async def use(teacher: VllmTeacher) -> None:
        first = asyncio.create_task(teacher.answer(Request([], [1])))
        await asyncio.sleep(0)
        child = teacher._child
        (waiting,) = child._waiting.values()
        late: list[BaseException | Answer] = []

        def ask_late(_: object) -> None:
            assert child._reader.is_alive()
            asked = asyncio.wait_for(teacher.answer(Request([], [2])), 5)
            late.extend(asyncio.run(gathered(asked)))

        async def gathered(asked: Any) -> Any:
            return await asyncio.gather(asked, return_exceptions=True)

        waiting.add_done_callback(ask_late)
        os.killpg(child._process.pid, signal.SIGKILL)
        with pytest.raises(EngineError, match="its process ended"):
            await first
        child._reader.join()
        assert [type(one) for one in late] == [EngineError]

    with_teacher(stubbed("hangs"), use)


class _GivenUpMeanwhile(Future[Any]):
    """What its asker gives up in the moment behind the question whether it has."""

    def cancelled(self) -> bool:
        told = super().cancelled()
        self.cancel()
        return told

    def set_running_or_notify_cancel(self) -> bool:
        told = super().set_running_or_notify_cancel()
        self.cancel()
        return told


@pytest.mark.parametrize("asked", [1, PADDED_VOCABULARY], ids=["answered", "refused"])
def test_an_answer_that_is_given_up_as_it_arrives_costs_no_other_its_own(
    stubbed: Callable[..., VllmModel], monkeypatch: pytest.MonkeyPatch, asked: int
) -> None:
    async def use(teacher: VllmTeacher) -> None:
        with monkeypatch.context() as patch:
            patch.setattr("potstill.teachers.vllm.Future", _GivenUpMeanwhile)
            await asyncio.gather(teacher.answer(Request([], [asked])), return_exceptions=True)
        answer = await asyncio.wait_for(teacher.answer(Request([], [2, 3])), 20)
        assert answer.prompt_token_ids == [2, 3]

    with_teacher(stubbed(), use)


def test_closing_ends_all_processes_and_gives_up_what_is_under_way(
    stubbed: Callable[..., VllmModel], family: Family
) -> None:
    async def run() -> None:
        teacher = VllmTeacher(stubbed("hangs", family=family.path))
        asked = asyncio.create_task(teacher.answer(Request([], [1])))
        await asyncio.sleep(0)
        assert not family.ends(within_s=0)
        await teacher.close()
        with pytest.raises(EngineError, match="closed while it answered"):
            await asked

    asyncio.run(run())
    assert family.ends()


def test_all_processes_end_with_whoever_asked_however_busy_they_are(
    stubbed: Callable[..., VllmModel], family: Family
) -> None:
    async def use(teacher: VllmTeacher) -> None:
        asked = asyncio.create_task(teacher.answer(Request([], [1])))
        await asyncio.sleep(0)
        assert not family.ends(within_s=0)
        teacher._child._requests.close()  # as the system does for a run that is killed
        assert family.ends()
        with pytest.raises(EngineError, match="its process ended"):
            await asked

    with_teacher(stubbed("hangs", family=family.path), use)


def test_what_cannot_be_loaded_is_told_in_the_engines_words_and_leaves_nothing(
    stubbed: Callable[..., VllmModel], family: Family
) -> None:
    with pytest.raises(EngineError, match="vLLM failed: ValueError: no such quantization"):
        VllmTeacher(stubbed("does not load", family=family.path))
    assert family.ends()


def test_an_interpreter_that_ends_at_once_is_told_with_its_last_words(
    settings: VllmModel, tmp_path: Path
) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho no such library >&2\n")
    python.chmod(0o700)
    # More than a pipe holds, so that it cannot be written before the process has ended.
    arguments = {"additional_config": "x" * 2**21}
    dying = settings.model_copy(update={"python": str(python), "engine_arguments": arguments})
    with pytest.raises(EngineError, match="its process ended; the last that it said: no such library"):
        VllmTeacher(dying)


@pytest.fixture
def vllm(folder: Path, monkeypatch: pytest.MonkeyPatch) -> VllmModel:
    """The tiny model for a real vLLM."""
    if VLLM_PYTHON is None:
        pytest.skip("POTSTILL_VLLM_PYTHON names no interpreter with vLLM")
    for name, value in vllm_environment().items():
        monkeypatch.setenv(name, value)
    return VllmModel(engine="vllm", path=str(folder), dtype="float32", **VLLM_SMALL)


def ask(teacher: VllmTeacher, **request: Any) -> list[Answer]:
    async def run() -> list[Answer]:
        prompts = [teacher.renderer.prompt_ids(one) for one in QUESTIONS]
        return await asyncio.gather(
            *(teacher.answer(Request([], ids, seed=seed, **request)) for seed, ids in enumerate(prompts))
        )

    return asyncio.run(run())


@pytest.fixture
def opened(vllm: VllmModel) -> Iterator[VllmTeacher]:
    teacher = open_teacher(vllm)
    assert isinstance(teacher, VllmTeacher)
    yield teacher
    asyncio.run(teacher.close())


@pytest.mark.slow
def test_a_seed_draws_the_same_whatever_is_decoded_beside_it(opened: VllmTeacher) -> None:
    together = ask(opened, temperature=1.0, max_new_tokens=12, logprobs=5)
    for answer in together:  # the model's vocabulary has four ids more
        assert max(answer.response_token_ids or [0]) < len(opened.renderer.tokenizer)
    assert len({answer.response for answer in together}) > 1

    async def alone() -> list[Answer]:
        found = []
        for seed, question in enumerate(QUESTIONS):
            ids = opened.renderer.prompt_ids(question)
            found.append(await opened.answer(Request([], ids, seed=seed, max_new_tokens=12, logprobs=5)))
        return found

    for one, other in zip(together, asyncio.run(alone()), strict=True):
        assert one.response_token_ids == other.response_token_ids
        assert one.alternatives is not None
        for place in one.alternatives:
            assert len(place) == 5
            assert [logprob for _, logprob in place] == sorted((p for _, p in place), reverse=True)


@pytest.mark.slow
def test_copies_answer_and_score_as_one_does_and_end_with_whoever_asked(
    opened: VllmTeacher, vllm: VllmModel
) -> None:
    expected = ask(opened, temperature=0.7, max_new_tokens=8, logprobs=1)

    async def run() -> list[Answer]:
        teacher = await ReplicatedTeacher.open(vllm, CopiesHere(2))
        try:
            prompts = [opened.renderer.prompt_ids(one) for one in QUESTIONS]
            asked = [
                Request([], ids, seed=seed, temperature=0.7, max_new_tokens=8, logprobs=1)
                for seed, ids in enumerate(prompts)
            ]
            return await asyncio.gather(*map(teacher.answer, asked))
        finally:
            await teacher.close()

    assert [one.response_token_ids for one in asyncio.run(run())] == [
        one.response_token_ids for one in expected
    ]


@pytest.mark.slow
def test_a_vllm_that_dies_ends_what_is_asked_with_its_last_words(opened: VllmTeacher) -> None:
    async def run() -> None:
        ids = opened.renderer.prompt_ids(QUESTIONS[0])
        os.killpg(opened._child._process.pid, signal.SIGKILL)
        for _ in range(2):
            with pytest.raises(EngineError, match="vLLM failed: its process ended") as failure:
                await opened.answer(Request([], ids, max_new_tokens=400))
            assert not isinstance(failure.value, RequestError)

    asyncio.run(run())


@pytest.mark.slow
def test_what_vllm_cannot_do_is_told_in_its_words(vllm: VllmModel) -> None:
    model = vllm.model_copy(update={"engine_arguments": {"quantization": "nothing_like_it"}})
    with pytest.raises(EngineError, match=r"(?s)vLLM failed: .*nothing_like_it"):
        VllmTeacher(model)


@pytest.mark.slow
def test_nothing_stays_behind_where_the_run_is_killed(vllm: VllmModel) -> None:
    code = (
        "import sys, time; from potstill.teachers import VllmModel, open_teacher\n"
        "teacher = open_teacher(VllmModel.model_validate_json(sys.argv[1]))\n"
        "print(teacher._child._process.pid, flush=True); time.sleep(600)"
    )
    command = [sys.executable, "-c", code, vllm.model_dump_json()]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        child = psutil.Process(int(run.stdout.readline()))
        family = [child, *child.children(recursive=True)]
        run.kill()
    gone, alive = psutil.wait_procs(family, timeout=20)
    assert gone
    assert not alive
