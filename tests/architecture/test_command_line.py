"""The command line starts at once, because nothing heavy is imported before a command runs."""

import resource
import subprocess
import sys

HEAVY = {"torch", "transformers", "pyarrow", "httpx2", "matplotlib", "reasoning_gym", "numpy"}


def _modules_after(code: str) -> set[str]:
    script = f"import sys\n{code}\nprint(*{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split())


def test_the_command_line_imports_nothing_heavy() -> None:
    assert _modules_after("import potstill.cli") & (HEAVY | {"pydantic"}) == set()


def test_reading_a_recipe_imports_nothing_heavy() -> None:
    assert _modules_after("import potstill.recipe") & HEAVY == set()


def test_help_takes_less_than_half_a_second_of_processor_time() -> None:
    command = [sys.executable, "-c", "from potstill.cli import main; main()", "--help"]

    def seconds() -> float:
        # Not the time by the clock, of which other processes may take any part.
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert "Distil big language models" in done.stdout
        return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime

    assert min(seconds() for _ in range(3)) < 0.5
