"""Runs the fuzz tests for longer, led by the coverage of potstill's code: `make fuzz`.

    python -m tests.fuzz.run [--seconds 120] [NAME ...]

Each test whose name holds one of NAMEs (by default each) has a process of its own, so that one that dies is
found as well; the first failure of each is printed with the input that led to it. Exits 1 where there is one.
"""

import argparse
import subprocess
import sys
import warnings


def fuzz(name: str, seconds: int) -> None:
    """Fuzz one test in this process, which ends with it."""
    import atheris

    warnings.simplefilter("error")
    with atheris.instrument_imports(include=["potstill"]):
        import torch
        from tests.fuzz import test_fuzz

        torch.set_num_threads(1)
        test = getattr(test_fuzz, name)
        test()  # what is imported late is instrumented too
    options = [
        f"-max_total_time={seconds}",
        "-max_len=4096",
        "-len_control=0",
        "-rss_limit_mb=4096",
        "-timeout=60",
        "-print_final_stats=1",
    ]
    atheris.Setup([sys.argv[0], *options], test.hypothesis.fuzz_one_input)
    atheris.Fuzz()


def main() -> int:
    """Fuzz the tests that are asked for one after the other; the number of those that failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--seconds", type=int, default=120)
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.here:
        fuzz(asked.names[0], asked.seconds)
    from tests.fuzz import test_fuzz

    names = [name for name, test in vars(test_fuzz).items() if hasattr(test, "hypothesis")]
    failed = 0
    for name in names:
        if not asked.names or any(part in name for part in asked.names):
            command = [
                sys.executable,
                "-m",
                "tests.fuzz.run",
                name,
                "--here",
                "--seconds",
                str(asked.seconds),
            ]
            print(f"== {name}", flush=True)
            failed += subprocess.run(command, check=False).returncode != 0
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
