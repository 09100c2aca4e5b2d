"""What it costs to start ``dgx-music``: CPU time of each command beside ``import typer, rich``, in one table.

CPU time is user and system time of the child process, as the kernel counts it: on a shared machine
it varies less than seconds on the clock. The runs of all commands take turns. Python may write
compiled files, as it does for an installed package.

    python -m benchmarks.startup --runs 9
"""

from __future__ import annotations

import argparse
import os
import platform
import resource
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from statistics import median

FLOOR = ["-c", "import typer, rich"]
COMMANDS = (
    *(
        "--version",
        "--help",
        "enqueue --help",
        "worker --help",
        "list --help",
        "doctor --help",
        "db --help",
    ),
    *("list", "stats", "show ID"),
)
ROWS = 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=9, help="runs of each command")
    runs = parser.parse_args().runs
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder))
        generation_id = bench.fill()
        lines = {
            name: ["-m", "dgx_music.cli", *name.replace("ID", generation_id).split()]
            for name in COMMANDS
        }
        seconds = measure(bench, {"import typer, rich": FLOOR, **lines}, runs)
    print_table(seconds, runs)


class Bench:
    """A folder with a small database, and the commands that run in it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        kept = {
            name: value for name, value in os.environ.items() if not name.startswith("DGX_MUSIC_")
        }
        kept.pop("PYTHONDONTWRITEBYTECODE", None)
        self._environment = kept | {"PYTHONPYCACHEPREFIX": str(folder / "compiled")}

    def fill(self) -> str:
        """Enqueue some prompts and return the id of one."""
        prompts = "\n".join(f"lofi rain {number}" for number in range(ROWS))
        command = [sys.executable, "-m", "dgx_music.cli", "enqueue", "--file", "-"]
        done = subprocess.run(
            command,
            input=prompts,
            cwd=self._folder,
            env=self._environment,
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout.split()[0]

    def cpu_seconds(self, arguments: list[str]) -> float:
        """Run Python with these arguments and return the CPU time that it took."""
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(
            [sys.executable, *arguments],
            cwd=self._folder,
            env=self._environment,
            capture_output=True,
            check=True,
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def measure(bench: Bench, lines: dict[str, list[str]], runs: int) -> dict[str, float]:
    """Return the median CPU time of each command, in seconds, after one run that is not counted."""
    taken: dict[str, list[float]] = {name: [] for name in lines}
    for number in range(runs + 1):
        for name, arguments in lines.items():
            seconds = bench.cpu_seconds(arguments)
            if number > 0:
                taken[name].append(seconds)
    return {name: median(each) for name, each in taken.items()}


def print_table(seconds: dict[str, float], runs: int) -> None:
    packages = ", ".join(f"{name} {version(name)}" for name in ("typer", "rich", "sqlalchemy"))
    print(
        f"CPU time, median of {runs} runs that take turns, a SQLite database with {ROWS} generations."
    )
    print(f"{processor()} ({os.cpu_count()} CPUs), {platform.system()} {platform.release()},")
    print(f"Python {platform.python_version()}, {packages}\n")
    print("| command | CPU ms | of `import typer, rich` |")
    print("|---|---:|---:|")
    floor = next(iter(seconds.values()))
    for name, each in seconds.items():
        print(f"| `{name}` | {each * 1000:.0f} | {each / floor:.2f} |")


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


if __name__ == "__main__":
    main()
