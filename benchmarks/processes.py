"""The other processes of the measurements: ``python -m benchmarks.processes NAME QUEUE LOCATION …``.

``start`` starts one and ``hear`` reads the JSON lines that it prints.
"""

from __future__ import annotations

import asyncio
import json
import pkgutil
import random
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.contestants import Queue

QUIET_SECONDS = 3.0


async def start(name: str, kind: type[Queue], *arguments: str) -> asyncio.subprocess.Process:
    """Start a process and return it when it is ready; ``begin`` lets it go on."""
    process = await asyncio.create_subprocess_exec(
        *[sys.executable, "-m", "benchmarks.processes", name, kind.key(), *arguments],
        cwd=Path(__file__).parents[1],
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        limit=2**24,
    )
    if await hear(process) != "ready":
        raise RuntimeError(f"the process {name} did not get ready")
    return process


def begin(process: asyncio.subprocess.Process) -> None:
    if process.stdin is not None:
        process.stdin.write(b"begin\n")


async def hear(process: asyncio.subprocess.Process) -> Any:
    if process.stdout is None:
        raise RuntimeError("nothing is piped")
    line = await process.stdout.readline()
    return json.loads(line) if line else None


# what they do


def tell(what: object) -> None:
    print(json.dumps(what), flush=True)


async def wait_to_begin() -> None:
    """Report that this process is ready, and wait until all are."""
    tell("ready")
    await asyncio.to_thread(sys.stdin.readline)


async def work(kind: type[Queue], location: str, slots: str) -> None:
    """Work until nothing more arrives; print when each job arrived, by ``time.monotonic``.

    That clock is the same in all processes.
    """
    queue, moments = await kind.open(location), list[float]()
    await wait_to_begin()
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(
            queue.work(int(slots), lambda _: moments.append(time.monotonic())), name="worker"
        )
        seen = -1
        while len(moments) > seen:
            seen = len(moments)
            await asyncio.sleep(QUIET_SECONDS)
        await queue.stop()
    await queue.close()
    tell(moments)


async def produce(kind: type[Queue], location: str, count: str) -> None:
    """Enqueue one by one; print each prompt, and when its commit was acknowledged."""
    queue, rng = await kind.open(location), random.Random(1)
    await wait_to_begin()
    for number in range(int(count)):
        await asyncio.sleep(rng.uniform(0.02, 0.08))
        await queue.enqueue_and_wake(f"prompt {number}")
        tell([f"prompt {number}", time.monotonic()])
    await queue.close()


if __name__ == "__main__":
    what, queue_name, *arguments = sys.argv[1:]
    asyncio.run(globals()[what](pkgutil.resolve_name(queue_name), *arguments))
