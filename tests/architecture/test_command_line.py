"""The command line starts at once, because nothing heavy is imported before a command runs."""

import subprocess
import sys
import time

HEAVY = {"torch", "transformers", "pyarrow", "httpx", "matplotlib", "reasoning_gym", "numpy"}


def _modules_after(code: str) -> set[str]:
    script = f"import sys\n{code}\nprint(*{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split())


def test_the_command_line_imports_nothing_heavy() -> None:
    assert _modules_after("import potstill.cli") & (HEAVY | {"pydantic"}) == set()


def test_reading_a_recipe_imports_nothing_heavy() -> None:
    assert _modules_after("import potstill.recipe") & HEAVY == set()


def test_help_comes_in_half_a_second() -> None:
    command = [sys.executable, "-c", "from potstill.cli import main; main()", "--help"]

    def seconds() -> float:
        started = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert "Distil big language models" in done.stdout
        return time.perf_counter() - started

    # The best of several: the machine may be busy with other things.
    assert min(seconds() for _ in range(5)) < 0.5
