"""Code answers: which code counts, when it is right, and what a program that a model wrote is kept from."""

import os
import platform
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

from potstill.core.errors import DataError
from potstill.core.records import Record
from potstill.data.shapes import parse_row
from potstill.verifiers import judge
from potstill.verifiers.code import found_code
from potstill.verifiers.sandbox import Ran, confinement, run_program
from potstill.verifiers.settings import CodeVerifier

ALLOWED = CodeVerifier(allow_code=True, timeout_s=10)
HUMAN_EVAL = {
    "task_id": "HumanEval/0",
    "prompt": "from typing import List\n\n\n"
    'def double(values: List[int]) -> List[int]:\n    """Twice each."""\n',
    "entry_point": "double",
    "canonical_solution": "    return [2 * one for one in values]\n",
    "test": "def check(candidate):\n    assert candidate([1, 2]) == [2, 4]\n    assert candidate([]) == []\n",
}
MBPP = {
    "text": "Write a function to add two numbers.",
    "code": "def add(a, b):\n    return a + b",
    "test_list": ["assert add(1, 2) == 3", "assert add(-1, 1) == 0"],
    "test_setup_code": "",
}
APPS = {
    "question": "Print the sum of two numbers.",
    "input_output": '{"inputs": ["1 2\\n", "5 -5\\n"], "outputs": ["3\\n", "0\\n"]}',
}


def problem(row: dict[str, Any]) -> Record:
    example = parse_row(row, "code")
    return Record("p", example.messages, response=example.response, task=example.task, meta=example.meta)


def fenced(code: str) -> str:
    return f"Here:\n```python\n{code}\n```\n"


class TestTheCode:
    def test_is_the_last_block_that_defines_what_the_tests_call(self) -> None:
        text = fenced("def f():\n    return 0") + fenced("def f():\n    return 1") + fenced("print(f())")
        assert found_code(text, frozenset({"f"})) == "def f():\n    return 1\n"
        assert found_code(text, frozenset({"g"})) == "print(f())\n"

    def test_blocks_of_other_languages_do_not_count(self) -> None:
        assert found_code("```python\nx = 1\n```\n```bash\nls\n```") == "x = 1\n"
        assert found_code("```bash\nls\n```") == ""

    def test_a_block_that_was_cut_off_counts_as_far_as_it_goes(self) -> None:
        assert found_code("```python\nx = 1\ny =") == "x = 1\ny ="

    @pytest.mark.parametrize("text", ["```" + "a" * 300_000, "```" + " " * 300_000 + "a", "```" * 100_000])
    def test_no_text_takes_long(self, text: str) -> None:
        started = time.monotonic()
        found_code(text)
        assert time.monotonic() - started < 2

    def test_without_a_fence_all_of_the_text_is_code(self) -> None:
        assert found_code("    return 1") == "    return 1"


class TestRows:
    @pytest.mark.parametrize("row", [HUMAN_EVAL, MBPP], ids=["humaneval", "mbpp"])
    def test_the_given_solution_passes_and_a_wrong_one_fails(self, row: dict[str, Any]) -> None:
        record = problem(row)
        assert record.response is not None
        assert judge(record, record.response, ALLOWED).verdicts == {
            "well_formed": False,
            "correct": True,
            "has_code": True,
        }
        wrong = judge(record, record.response.replace("2 *", "3 *").replace("a + b", "a - b"), ALLOWED)
        assert not wrong.verdicts["correct"]
        assert wrong.note == "AssertionError"

    @pytest.mark.parametrize(
        "body",
        [
            "    return [2 * v for v in values]",
            "    found = []\n    for v in values:\n        found.append(2 * v)\n    return found\n",
            fenced("found = [2 * v for v in values]\nreturn found"),
            fenced("    if values:\n        return [2 * v for v in values]\n    return []"),
            fenced("found = []\nfor v in values:\n    found.append(2 * v)\nreturn found"),
            "    # twice\n    return [2 * v for v in values]",
        ],
    )
    def test_a_body_goes_on_from_the_functions_beginning(self, body: str) -> None:
        assert judge(problem(HUMAN_EVAL), body, ALLOWED).verdicts["correct"]

    @pytest.mark.parametrize(
        "body",
        [
            "    return [2 * v for v in values]",
            "    found = []\n    for v in values:\n        found.append(2 * v)\n    return found",
            "    for v in values:\n        pass\n    return [2 * v for v in values]",
        ],
    )
    @pytest.mark.parametrize(
        "more",
        [
            "def double(values):\n    return values\n",
            'def triple(values: List[int]) -> List[int]:\n    """Three times',
            "print(double([1, 2]))\nprint(double(",
            "if __name__ == '__main__':\n    import doc",
        ],
        ids=["again", "cut off", "calls", "main"],
    )
    def test_what_a_base_model_writes_behind_the_function_does_not_count(self, body: str, more: str) -> None:
        found = judge(problem(HUMAN_EVAL), f"{body}\n\n\n{more}", ALLOWED)
        assert found.verdicts["correct"], found.note

    def test_a_whole_function_needs_no_imports_that_the_beginning_has(self) -> None:
        code = "def double(values: List[int]) -> List[int]:\n    return [v + v for v in values]"
        assert judge(problem(HUMAN_EVAL), fenced(code), ALLOWED).verdicts["correct"]

    def test_what_code_does_when_started_itself_is_no_part_of_the_tests(self) -> None:
        demonstration = "if __name__ == '__main__':\n    print(add(int(input()), 1))"
        code = f"def add(a, b):\n    return a + b\n\n{demonstration}"
        assert judge(problem(MBPP), fenced(code), ALLOWED).verdicts["correct"]
        alone = f"import sys\nadd = lambda a, b: len(sys.argv) + a\n{demonstration.replace('1))', '0))')}"
        row = {"question": "One more.", "input_output": '{"inputs": ["1\\n"], "outputs": ["2\\n"]}'}
        assert judge(problem(row), fenced(alone), ALLOWED).verdicts["correct"]

    def test_tests_that_start_themselves_run(self) -> None:
        tests = "if __name__ == '__main__':\n    assert add(1, 2) == 3"
        row = {**MBPP, "test_list": [tests]}
        assert judge(problem(row), fenced("def add(a, b): return a + b"), ALLOWED).verdicts["correct"]
        assert not judge(problem(row), fenced("def add(a, b): return a - b"), ALLOWED).verdicts["correct"]

    def test_names_of_classes_are_found_again(self) -> None:
        code = (
            "import dataclasses, pickle, typing\n\n"
            "@dataclasses.dataclass\nclass Pair:\n    a: 'int'\n    other: 'Pair' = None\n\n"
            "def add(a, b):\n    assert typing.get_type_hints(Pair)['other'] is Pair\n"
            "    return pickle.loads(pickle.dumps(Pair(a + b))).a"
        )
        found = judge(problem(MBPP), fenced(code), ALLOWED)
        assert found.verdicts["correct"], found.note

    def test_a_program_reads_its_input_and_prints(self) -> None:
        record = problem(APPS)
        right = "print(sum(map(int, input().split())))"
        assert judge(record, fenced(right), ALLOWED).verdicts["correct"]
        assert judge(record, fenced(right + "\nraise SystemExit"), ALLOWED).verdicts["correct"]
        found = judge(record, fenced("print(3)"), ALLOWED)
        assert (found.verdicts["correct"], found.note) == (False, "case 2: another output")
        assert "case 1: ValueError" in str(judge(record, fenced("int('x')"), ALLOWED).note)

    def test_an_answer_without_code_is_wrong_and_nothing_runs(self) -> None:
        found = judge(problem(MBPP), "```text\nno\n```", ALLOWED)
        assert found.verdicts["has_code"] is found.verdicts["correct"] is False

    def test_nothing_runs_unless_the_recipe_allows_it(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="not run unless the recipe says so") as caught:
            judge(problem(MBPP), fenced(f"open({str(tmp_path / 'ran')!r}, 'w')"))
        assert "allow_code: true" in str(caught.value)
        assert not (tmp_path / "ran").exists()

    def test_rows_without_tests_are_told_what_is_missing(self) -> None:
        with pytest.raises(DataError, match="no tests to run code against"):
            judge(Record("p", [{"role": "user", "content": "?"}], task="code"), "x", ALLOWED)

    @pytest.mark.parametrize(
        "cheat",
        [
            "import os; os._exit(0)",
            "import sys; sys.exit(0)",
            "raise SystemExit",
            "print('passed'); import os; os.close(1); os._exit(0)",
        ],
    )
    def test_to_end_before_the_tests_is_not_to_pass_them(self, cheat: str) -> None:
        assert not judge(problem(MBPP), fenced(f"def add(a, b): return 0\n{cheat}"), ALLOWED).verdicts[
            "correct"
        ]


def run(program: str, **options: Any) -> Ran:
    return run_program(program, **{"timeout_s": 10, **options})


needs_files = pytest.mark.skipif("files" not in confinement(), reason="the kernel has no Landlock")
needs_calls = pytest.mark.skipif("processes and network" not in confinement(), reason="there is no seccomp")


class TestTheSandbox:
    def test_an_ordinary_program_runs_with_its_libraries(self) -> None:
        ran = run("import json, numpy, threading\nprint(json.dumps(numpy.arange(3).tolist()))")
        assert ran == Ran(True, "[0, 1, 2]\n", None, confinement())

    def test_one_that_does_not_end_is_ended(self) -> None:
        started = time.monotonic()
        assert run("while True: pass", timeout_s=0.5).note == "no end within 0.5 s"
        assert run("import time; time.sleep(60)", timeout_s=0.5).note == "no end within 0.5 s"
        assert time.monotonic() - started < 20

    def test_its_memory_is_bounded(self) -> None:
        assert run("x = bytearray(400 << 20)", memory_mb=256).note == "MemoryError"

    def test_its_files_are_bounded_and_gone_afterwards(self, tmp_path: Path) -> None:
        ran = run("with open('big', 'wb') as f:\n    for _ in range(64): f.write(bytes(1 << 20))")
        assert ran.note == "OSError: [Errno 27] File too large"
        ran = run("import os\nopen('own', 'w').write('x')\nprint(os.getcwd(), os.listdir())")
        folder = ran.output.split()[0]
        assert "own" in ran.output
        assert not Path(folder).exists()

    def test_folders_in_folders_are_gone_however_deep(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
        ran = run(
            "import os\n"
            "for name in ('shut', 'open'): os.mkdir(name, 0)\n"
            "os.symlink('/', 'link')\n"
            "for _ in range(1100):\n    open('file', 'w').close(); os.mkdir('a'); os.chdir('a')",
            timeout_s=60,
        )
        assert ran.finished, ran.note
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize(
        "step",
        ["open(str(n), 'wb').write(bytes(16 << 20))", "open(str(n), 'wb').close()"],
        ids=["bytes", "files"],
    )
    def test_the_disk_is_not_filled_with_files(self, step: str) -> None:
        ran = run(
            f"import time\nn = 0\nwhile n < 20_000:\n    {step}\n    n += 1\ntime.sleep(5)", timeout_s=30
        )
        assert ran.note == "it wrote more than 256 MB, or 10,000 files"

    @needs_calls
    def test_an_end_by_a_signal_without_a_name_is_told(self) -> None:
        ran = run(
            "import ctypes, struct, time\n"
            "c, timer = ctypes.CDLL(None), ctypes.create_string_buffer(8)\n"
            "c.timer_create(1, struct.pack('=Qii', 0, 40, 0) + bytes(64), timer)\n"
            "at = struct.pack('=4q', 0, 0, 0, 1_000_000)\n"
            "c.timer_settime(ctypes.c_void_p(struct.unpack('P', timer.raw)[0]), 0, at, None)\n"
            "time.sleep(5)"
        )
        assert ran.note == "ended by signal 40"

    @pytest.mark.parametrize("written", ["garbage", "5", "[" * 9000])
    def test_what_it_writes_over_the_result_breaks_nothing(self, written: str) -> None:
        over = (
            "import os\nfor place in range(3, 1024):\n"
            "    try: os.pwrite(place, WRITTEN, 0)\n    except OSError: pass"
        )
        ran = run(over.replace("WRITTEN", repr(written.encode())), tests="assert False")
        assert (ran.finished, ran.confinement) == (False, ())

    def test_endless_output_fills_no_memory(self) -> None:
        ran = run("while True: print('x' * 1_000_000)")
        assert not ran.finished
        assert len(ran.output) <= 1 << 20

    def test_no_keys_are_in_its_environment(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("SOME_API_KEY", "sk-canary-4711")
        ran = run("import os\nprint(dict(os.environ))")
        assert ran.finished
        assert "canary" not in ran.output

    @needs_files
    def test_it_reads_no_files_but_the_interpreters(self, tmp_path: Path) -> None:
        secret = tmp_path / "secret"
        secret.write_text("sk-canary-4711", encoding="utf-8")
        for place in (str(secret), "/etc/passwd", f"/proc/{os.getpid()}/environ", "/proc/self/environ"):
            assert "PermissionError" in str(run(f"print(open({place!r}).read())").note), place
        assert "PermissionError" in str(run(f"import os; os.listdir({str(tmp_path)!r})").note)

    @needs_files
    def test_it_writes_nothing_outside_its_folder(self, tmp_path: Path) -> None:
        victim = tmp_path / "victim"
        victim.write_text("whole", encoding="utf-8")
        for attempt in (
            f"open({str(tmp_path / 'new')!r}, 'w')",
            f"open({str(victim)!r}, 'r+').truncate(0)",
            f"import os; os.remove({str(victim)!r})",
            f"import os; os.truncate({str(victim)!r}, 0)",
        ):
            assert "PermissionError" in str(run(attempt).note), attempt
        assert [one.name for one in tmp_path.iterdir()] == ["victim"]
        assert victim.read_text(encoding="utf-8") == "whole"

    @needs_calls
    def test_it_opens_no_connection(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
            attempt = f"import socket; socket.create_connection(('127.0.0.1', {port}), timeout=5)"
            assert "PermissionError" in str(run(attempt).note)

    @needs_calls
    @pytest.mark.parametrize(
        "attempt",
        [
            "import os; os.fork()",
            "import subprocess; subprocess.run(['true'])",
            "import os; os.execv('/bin/true', ['true'])",
            "import os; os.kill(os.getppid(), 9)",
            "import multiprocessing; multiprocessing.Process(target=print).start()",
        ],
    )
    def test_it_starts_no_process_and_ends_none(self, attempt: str) -> None:
        assert "PermissionError" in str(run(attempt).note)

    @needs_calls
    def test_it_cannot_lift_its_limits_and_has_no_capabilities(self) -> None:
        attempt = "import resource; resource.setrlimit(resource.RLIMIT_AS, (-1, -1))"
        assert "not allowed to raise maximum limit" in str(run(attempt).note)
        # capget: effective, permitted and inheritable sets, in two words each.
        number = {"x86_64": 125, "aarch64": 90}[platform.machine()]
        asked = (
            "import ctypes, struct\n"
            "found = ctypes.create_string_buffer(24)\n"
            f"done = ctypes.CDLL(None).syscall({number}, struct.pack('=Ii', 0x20080522, 0), found)\n"
            "print(done, set(found.raw))"
        )
        assert run(asked).output == "0 {0}\n"

    @needs_calls
    @pytest.mark.parametrize(
        "attempt",
        [
            "import resource; resource.prlimit(VICTIM, resource.RLIMIT_CPU, (0, 0))",
            "import os; os.sched_setaffinity(VICTIM, {0})",
            "import os; os.setpriority(os.PRIO_PROCESS, VICTIM, 19)",
            "import fcntl, os; fcntl.fcntl(os.pipe()[0], 8, VICTIM)",  # F_SETOWN: who is signalled
            "import fcntl, os; fcntl.fcntl(os.pipe()[0], 10, 9)",  # F_SETSIG: by which signal
        ],
    )
    def test_it_changes_nothing_of_other_processes(self, attempt: str) -> None:
        with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as victim:
            note = run(attempt.replace("VICTIM", str(victim.pid))).note
        assert "Operation not permitted" in str(note)
        assert "PermissionError" in str(note)

    @needs_calls
    @pytest.mark.parametrize("attempt", ["os.chmod(FILE, 0)", "os.utime(FILE, (1, 1))", "os.fchmod(1, 0)"])
    def test_it_changes_no_rights_and_no_times_of_files(self, attempt: str, tmp_path: Path) -> None:
        victim = tmp_path / "victim"
        victim.touch()
        before = victim.stat()
        assert "PermissionError" in str(run(f"import os; {attempt.replace('FILE', repr(str(victim)))}").note)
        assert (victim.stat().st_mode, victim.stat().st_mtime) == (before.st_mode, before.st_mtime)

    @needs_calls
    @pytest.mark.parametrize("call", ["shmget(0, 4096, 0o1600)", "msgget(0, 0o1600)", "semget(0, 1, 0o1600)"])
    def test_it_leaves_nothing_in_the_kernel(self, call: str) -> None:
        ran = run(
            f"import ctypes\nc = ctypes.CDLL(None, use_errno=True)\nprint(c.{call}, ctypes.get_errno())"
        )
        assert ran.output == "-1 1\n"

    @needs_calls
    def test_threads_are_allowed(self) -> None:
        ran = run("import threading\nt = threading.Thread(target=print, args=('x',))\nt.start(); t.join()")
        assert (ran.finished, ran.output) == (True, "x\n")

    def test_sets_print_in_the_same_order_every_time(self) -> None:
        printed = {run("print({'a', 'b', 'c', 'd', 'e', 'f'})").output for _ in range(3)}
        assert len(printed) == 1

    @pytest.mark.skipif("CI" not in os.environ, reason="what the project's own checks run on")
    def test_on_a_current_linux_everything_is_shut_in(self) -> None:
        assert confinement() == ("limits", "files", "processes and network")
