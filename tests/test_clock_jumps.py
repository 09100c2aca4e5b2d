"""A clock that really jumps, under real daemons: a small library between them and the system's, which takes no root."""

import shutil
import signal
import subprocess

import anyio
import pytest

from tests.daemons import add, attempts_of, is_finished, is_running, until, until_registered
from tests.factories import SQLITE, on

COMPILER = shutil.which("cc") or shutil.which("gcc")
HOUR = 3_600
LIBRARY = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/time.h>
#include <time.h>

static long ahead(void) {
    long seconds = 0;
    FILE *file = fopen(getenv("TEST_CLOCK"), "r");
    if (file) { if (fscanf(file, "%ld", &seconds) != 1) seconds = 0; fclose(file); }
    return seconds;
}
int clock_gettime(clockid_t id, struct timespec *now) {
    int (*real)(clockid_t, struct timespec *) = dlsym(RTLD_NEXT, "clock_gettime");
    int answer = real(id, now);
    if (id == CLOCK_REALTIME) now->tv_sec += ahead();
    return answer;
}
int gettimeofday(struct timeval *restrict now, void *restrict zone) {
    int (*real)(struct timeval *, void *) = dlsym(RTLD_NEXT, "gettimeofday");
    int answer = real(now, zone);
    now->tv_sec += ahead();
    return answer;
}
time_t time(time_t *now) {
    struct timespec moment;
    clock_gettime(CLOCK_REALTIME, &moment);
    if (now) *now = moment.tv_sec;
    return moment.tv_sec;
}
"""

pytestmark = [
    on(SQLITE),
    pytest.mark.skipif(COMPILER is None, reason="there is no C compiler to build the clock with"),
]


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clock")
    (folder / "clock.c").write_text(LIBRARY)
    command = [str(COMPILER), "-shared", "-fPIC", "-o", "clock.so", "clock.c", "-ldl"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    return folder / "clock.so"


@pytest.fixture
def step(library, tmp_path, monkeypatch):
    """Return a function that sets how far the clock of the daemons is ahead, in seconds."""
    monkeypatch.setenv("LD_PRELOAD", str(library))
    monkeypatch.setenv("TEST_CLOCK", str(tmp_path / "clock"))

    def set_ahead(seconds):
        (tmp_path / "clock.new").write_text(str(seconds))
        (tmp_path / "clock.new").rename(tmp_path / "clock")

    set_ahead(0)
    return set_ahead


async def test_what_was_due_before_the_clock_was_set_back_is_made_at_once(database, start, step):
    generation = await add(database)
    step(-HOUR)
    start(is_fresh=True)
    assert (await until(database, generation, is_finished)).status == "completed"


async def test_a_lost_worker_is_noticed_though_the_clock_was_set_back(
    database, start, script, step
):
    generation = await add(database)
    path = script({"attempts": [1], "do": "wait", "seconds": 600})
    lost = start(script=path, is_fresh=True)
    await until(database, generation, is_running)
    lost.send(signal.SIGKILL)
    lost.wait()
    step(-HOUR)
    start(script=path, is_fresh=True)
    row = await until(database, generation, is_finished)
    assert (row.status, row.attempt) == ("completed", 2)


async def test_living_workers_lose_nothing_when_the_clock_is_set_forward(
    database, start, script, step
):
    path = script({"do": "wait", "seconds": 5.0})
    daemons = [start(script=path, is_fresh=True) for _ in range(2)]
    await until_registered(database, daemons)
    # until each has looked at the clock: who comes after a jump cannot know of it
    await anyio.sleep(2.0)
    generation = await add(database)
    await until(database, generation, is_running)
    step(HOUR)
    row = await until(database, generation, is_finished)
    assert (row.status, row.attempt) == ("completed", 1)
    assert [attempt.outcome for attempt in await attempts_of(database)] == ["completed"]
