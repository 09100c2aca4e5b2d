from __future__ import annotations

import asyncio
import gc
import os
import resource
import select
import signal
import subprocess
import sys
from pathlib import Path

import anyio
import numpy as np
import pytest

from dgx_music.audio.samples import Audio
from dgx_music.catalog import TONE_NOTICE
from dgx_music.errors import (
    EngineCrashedError,
    EngineError,
    EngineReplacedError,
    EngineUnavailableError,
    GenerationRejectedError,
)
from dgx_music.inference import child_process
from dgx_music.inference import process as process_module
from dgx_music.inference.messages import EngineInfo, Finished, Unloaded
from dgx_music.inference.process import EngineProcess
from dgx_music.inference.tone import SCRIPT_VARIABLE, SPEED_VARIABLE, ToneEngine
from tests.inference.conftest import WriteScript
from tests.inference.factories import QuietRun, begin, ignore, make_process, make_request
from tests.patience import PATIENCE

SLOW = {"do": "wait", "seconds": 600}


def has_vanished(pid: int, within_seconds: float = PATIENCE) -> bool:
    """Return whether the process ends in time, by its pidfd: a zombie counts as ended."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([pidfd], [], [], within_seconds)[0])
    finally:
        os.close(pidfd)


def pid_of(process: EngineProcess) -> int:
    assert process.pid is not None
    return process.pid


@pytest.fixture
def stuck_interpreter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes every child load for ever."""
    monkeypatch.setattr(sys, "executable", write_impostor(tmp_path, "import time; time.sleep(600)"))


def write_impostor(folder: Path, code: str) -> str:
    """Return the path of an interpreter that runs this code, whatever it is asked to run."""
    path = folder / "python"
    path.write_text(f"#!{sys.executable}\n{code}\n")
    path.chmod(0o755)
    return str(path)


async def begin_start(process: EngineProcess) -> asyncio.Task[EngineInfo]:
    """Return the task of a start whose child is there, and loading."""
    starting = asyncio.create_task(process.start())
    with anyio.fail_after(PATIENCE):
        while process.pid is None:
            await asyncio.sleep(0.001)
    return starting


# start


async def test_start_says_what_was_loaded(process: EngineProcess) -> None:
    info = await process.start()

    assert (info.slots, info.device, info.model_version, info.notice) == (
        4,
        "cpu",
        "tone",
        TONE_NOTICE,
    )
    assert info.pid == process.pid != os.getpid()


async def test_two_starts_at_once_share_one_child() -> None:
    async with make_process() as process:
        first, second = await asyncio.gather(process.start(), process.start())

    assert first.pid == second.pid


async def test_another_model_is_loaded_beside_the_first(process: EngineProcess) -> None:
    first = process.pid
    info = await process.start("musicgen-medium")

    assert info.pid == process.pid == first
    assert (
        (await process.start("musicgen-small")).pid
        == (await process.start("musicgen-medium")).pid
        == first
    )
    for model in ("musicgen-small", "musicgen-medium"):
        assert (await process.generate(make_request(model=model), ignore)).duration == 0.08


async def test_loading_another_model_leaves_what_runs_alone(
    process: EngineProcess, script: WriteScript
) -> None:
    script({"do": "wait", "seconds": 0.5})
    running = await begin(process)
    await process.start("musicgen-medium")

    assert not running.done()
    assert (await running).duration == 0.08


async def test_each_model_has_slots_of_its_own(script: WriteScript) -> None:
    script(SLOW)
    async with make_process(slots=1) as process:
        await process.start()
        await process.start("musicgen-medium")
        tasks = [
            await begin(process, model=model) for model in ("musicgen-small", "musicgen-medium")
        ]

        assert not any(task.done() for task in tasks)


async def test_a_model_that_cannot_be_loaded_leaves_the_others_alone(
    process: EngineProcess, script: WriteScript
) -> None:
    pid = process.pid
    script().write_text("{")
    with pytest.raises(EngineUnavailableError, match="is malformed"):
        await process.start("musicgen-medium")
    script()

    assert (await process.start("musicgen-small")).pid == pid
    assert (await process.start("musicgen-medium")).pid == pid


async def test_a_model_that_is_not_loaded_generates_nothing(process: EngineProcess) -> None:
    with pytest.raises(EngineReplacedError, match="not running"):
        await process.generate(make_request(model="musicgen-medium"), ignore)


async def test_a_model_that_was_unloaded_is_loaded_by_the_next_start(
    process: EngineProcess,
) -> None:
    calls = process._calls
    assert calls is not None
    calls.receive(Unloaded("musicgen-small"))
    with pytest.raises(EngineReplacedError):
        await process.generate(make_request(), ignore)

    assert (await process.start()).pid == calls.child.pid
    assert (await process.generate(make_request(), ignore)).duration == 0.08


async def test_a_cancelled_start_leaves_the_child_to_the_next_one() -> None:
    async with make_process() as process:
        starting = await begin_start(process)
        pid = process.pid
        starting.cancel()

        assert (await process.start()).pid == pid
        assert starting.cancelled()


async def test_a_start_cancelled_at_any_moment_leaks_nothing() -> None:
    async with make_process() as process:
        for delay_seconds in np.linspace(0, 0.01, 12):
            with anyio.move_on_after(delay_seconds):
                await process.start()

        await process.start()

    assert len(asyncio.all_tasks()) == 1


@pytest.mark.usefixtures("stuck_interpreter")
async def test_a_child_killed_while_it_loads_makes_the_engine_unavailable() -> None:
    async with make_process() as process:
        starting = await begin_start(process)
        os.kill(pid_of(process), signal.SIGKILL)

        with pytest.raises(
            EngineUnavailableError, match=r"did not load: its process was killed by SIGKILL \(often"
        ):
            await starting


@pytest.mark.usefixtures("stuck_interpreter")
async def test_an_engine_that_takes_too_long_to_load_is_ended() -> None:
    async with make_process(start_timeout_seconds=0.01) as process:
        with pytest.raises(EngineUnavailableError, match=r"its process was ended after 0\.01 s\."):
            await process.start()

        assert not process.is_alive


async def test_an_unavailable_engine_says_why_in_its_own_words(script: WriteScript) -> None:
    script().write_text("{")

    async with make_process() as process:
        with pytest.raises(
            EngineUnavailableError, match=r"^The tone script .* is malformed: .*\.$"
        ):
            await process.start()

        assert process.pid is None


async def test_an_unknown_engine_is_unavailable() -> None:
    async with make_process(engine="theremin") as process:
        with pytest.raises(
            EngineUnavailableError, match="'theremin' is not known; use musicgen or tone"
        ):
            await process.start()


async def test_an_engine_can_become_available(script: WriteScript) -> None:
    script().write_text("{")
    async with make_process() as process:
        with pytest.raises(EngineUnavailableError):
            await process.start()
        script()

        assert (await process.start()).pid == process.pid


async def test_an_interpreter_that_is_missing_makes_the_engine_unavailable(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")

    async with make_process() as process:
        with pytest.raises(EngineUnavailableError, match="cannot be started"):
            await process.start()


# generate


async def test_audio_arrives_as_the_engine_made_it(process: EngineProcess) -> None:
    request = make_request(duration=1.5, channels=2)
    expected = ToneEngine(1, None, None).generate(request, QuietRun())

    audio = await process.generate(request, ignore)

    np.testing.assert_array_equal(audio.samples, expected.samples)
    assert (audio.samples.dtype, audio.sample_rate, audio.duration) == (np.float32, 32_000, 1.5)
    assert audio.facts["frequency_hz"] == expected.facts["frequency_hz"]


async def test_the_samples_can_be_changed_in_place(process: EngineProcess) -> None:
    audio = await process.generate(make_request(), ignore)

    audio.samples[:] = 0

    assert not audio.samples.any()


async def test_progress_rises_below_one(process: EngineProcess, script: WriteScript) -> None:
    script({"do": "wait", "seconds": 1.2})
    progress: list[float] = []

    await process.generate(make_request(), progress.append)

    assert 2 <= len(progress) <= 3
    assert progress == sorted(progress)
    assert 0 <= progress[0] < progress[-1] < 1


async def test_a_broken_progress_callback_breaks_nothing_else(
    process: EngineProcess, script: WriteScript
) -> None:
    script({"do": "wait", "seconds": 0.1})
    errors: list[object] = []
    asyncio.get_running_loop().set_exception_handler(
        lambda _, context: errors.append(context["exception"])
    )

    await process.generate(make_request(), lambda progress: progress / 0)

    assert [type(error) for error in errors] == [ZeroDivisionError]


async def test_sixteen_slots_mix_nothing_up() -> None:
    requests = [make_request(generation_id=f"g{number}") for number in range(200)]
    engine = ToneEngine(1, None, None)

    async with make_process(slots=16) as process:
        await process.start()
        audios = await asyncio.gather(*(process.generate(request, ignore) for request in requests))

    for request, audio in zip(requests, audios, strict=True):
        np.testing.assert_array_equal(audio.samples, engine.generate(request, QuietRun()).samples)


async def test_an_error_in_the_engine_costs_one_generation(
    process: EngineProcess, script: WriteScript
) -> None:
    script({"prompt": "storm", "do": "raise", "message": "no thunder today"})

    with pytest.raises(EngineError, match=r"^RuntimeError: no thunder today$") as caught:
        await process.generate(make_request(prompt="storm"), ignore)

    assert type(caught.value) is EngineError
    assert (await process.generate(make_request(), ignore)).duration == 0.08


async def test_a_rejection_comes_back_as_itself(
    process: EngineProcess, script: WriteScript
) -> None:
    script({"do": "reject", "message": "This prompt is too long for the model."})

    with pytest.raises(GenerationRejectedError, match=r"^This prompt is too long for the model\.$"):
        await process.generate(make_request(), ignore)


async def test_a_process_that_was_never_started_generates_nothing() -> None:
    with pytest.raises(EngineReplacedError, match="not running"):
        await make_process().generate(make_request(), ignore)


@pytest.mark.usefixtures("stuck_interpreter")
async def test_a_process_that_is_still_loading_generates_nothing() -> None:
    async with make_process() as process:
        starting = await begin_start(process)
        starting.cancel()

        with pytest.raises(EngineReplacedError, match="not running"):
            await process.generate(make_request(), ignore)


# slots


async def begin_audio(process: EngineProcess, **fields: object) -> asyncio.Task[Audio]:
    """Return the task of a generation that has freed its slot."""
    freed = asyncio.Event()
    task = asyncio.create_task(process.generate(make_request(**fields), ignore, freed.set))
    await asyncio.wait_for(freed.wait(), PATIENCE)
    return task


AUDIO = {"prompt": "long audio", "do": "wait", "audio_seconds": 60}


async def test_a_slot_is_free_before_the_audio_is_made(script: WriteScript) -> None:
    script(AUDIO)
    async with make_process(slots=1) as process:
        await process.start()
        task = await begin_audio(process, prompt="long audio")

        assert (await process.generate(make_request(), ignore)).duration == 0.08
        assert not task.done()


async def test_a_freed_slot_is_given_back_once(script: WriteScript) -> None:
    script({**AUDIO, "audio_seconds": 0.1}, {"prompt": "slow", **SLOW})
    async with make_process(slots=1) as process:
        await process.start()
        freed: list[str] = []
        for _ in range(2):
            await process.generate(
                make_request(prompt="long audio"), ignore, lambda: freed.append("once")
            )
        await begin(process, prompt="slow")
        waiting = asyncio.create_task(process.generate(make_request(), ignore))

        assert not (await asyncio.wait((waiting,), timeout=0.2))[0]
        assert freed == ["once"] * 2


async def test_a_generation_is_cancelled_after_its_slot_is_free_and_gives_it_back_once(
    script: WriteScript,
) -> None:
    script(AUDIO, {"prompt": "slow", **SLOW})
    async with make_process(slots=1) as process:
        pid = (await process.start()).pid
        task = await begin_audio(process, prompt="long audio")
        await begin(process, prompt="slow")
        task.cancel()
        await asyncio.wait((task,), timeout=PATIENCE)
        waiting = asyncio.create_task(process.generate(make_request(), ignore))

        assert not (await asyncio.wait((waiting,), timeout=0.2))[0]
        assert (task.cancelled(), process.pid) == (True, pid)


async def test_fewer_slots_let_in_no_more_and_are_remembered_by_the_next_process(
    script: WriteScript,
) -> None:
    script({"prompt": "big", "do": "shrink"}, {"prompt": "slow", **SLOW})
    async with make_process(slots=4) as process:
        first = (await process.start()).pid
        with pytest.raises(EngineReplacedError, match="scripted failure"):
            await process.generate(make_request(prompt="big"), ignore)
        assert (await process.start()).slots == 2
        for _ in range(2):
            await begin(process, prompt="slow")
        waiting = asyncio.create_task(process.generate(make_request(), ignore))
        assert not (await asyncio.wait((waiting,), timeout=0.2))[0]
        os.kill(first, signal.SIGKILL)
        await asyncio.wait((waiting,))

        info, other = await process.start(), await process.start("musicgen-medium")
        assert (info.pid == first, info.slots, other.slots) == (False, 2, 4)


async def test_the_slots_let_in_as_they_are_freed_whoever_is_cancelled_meanwhile() -> None:
    slots = anyio.CapacityLimiter(2)
    takers = [asyncio.create_task(slots.acquire_on_behalf_of(name)) for name in "abcde"]
    for _ in range(3):
        await asyncio.sleep(0)
    assert [task.done() for task in takers] == [True, True, False, False, False]
    takers[2].cancel()
    slots.release_on_behalf_of("a")
    takers[3].cancel()  # at the moment of its turn
    done, _ = await asyncio.wait(takers, timeout=PATIENCE)
    assert [task in done for task in takers] == [True] * 5
    assert [task.cancelled() for task in takers] == [False, False, True, True, False]


async def test_slots_that_have_become_fewer_let_nobody_in_before_as_many_are_free() -> None:
    slots = anyio.CapacityLimiter(4)
    for name in "abcd":
        await slots.acquire_on_behalf_of(name)
    slots.total_tokens = 2
    waiting = asyncio.create_task(slots.acquire_on_behalf_of("e"))
    for name in "ab":
        slots.release_on_behalf_of(name)
        await asyncio.sleep(0)
    assert not waiting.done()
    slots.release_on_behalf_of("c")
    await asyncio.wait_for(waiting, PATIENCE)


# cancel


@pytest.mark.parametrize("by_scope", [True, False])
async def test_a_cancel_frees_the_slot_and_costs_no_child(
    script: WriteScript, by_scope: bool
) -> None:
    script({"prompt": "slow", **SLOW})
    async with make_process(slots=1) as process:
        pid = (await process.start()).pid
        await (cancel_by_scope if by_scope else cancel_by_task)(process)
        await process.generate(make_request(), ignore)

        assert process.pid == pid  # it was heard within the grace, or another would be there


async def cancel_by_scope(process: EngineProcess) -> None:
    with anyio.CancelScope() as scope:
        await process.generate(make_request(prompt="slow"), lambda progress: scope.cancel())
    assert scope.cancelled_caught


async def cancel_by_task(process: EngineProcess) -> None:
    task = await begin(process, prompt="slow")
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_cancel_leaves_the_other_generation_alone(
    process: EngineProcess, script: WriteScript
) -> None:
    script({"prompt": "slow", **SLOW}, {"do": "wait", "seconds": 0.5})
    doomed = await begin(process, prompt="slow")
    other = await begin(process)
    doomed.cancel()

    expected = ToneEngine(1, None, None).generate(make_request(), QuietRun())
    np.testing.assert_array_equal((await other).samples, expected.samples)
    assert doomed.cancelled()


async def test_a_cancel_that_was_heard_has_no_consequences_later(script: WriteScript) -> None:
    script({"prompt": "slow", **SLOW}, {"do": "wait", "seconds": 2.5})
    async with make_process(cancel_grace_seconds=2.0) as process:
        pid = (await process.start()).pid
        await cancel_by_task(process)

        await process.generate(make_request(), ignore)

        assert process.pid == pid


async def test_a_generation_cancelled_in_the_queue_never_reaches_the_child(
    script: WriteScript,
) -> None:
    script({"prompt": "slow", **SLOW})
    async with make_process(slots=1) as process:
        pid = (await process.start()).pid
        running = await begin(process, prompt="slow")
        with anyio.move_on_after(0.05) as scope:
            await process.generate(make_request(), ignore)
        running.cancel()

        assert scope.cancelled_caught
        assert (await process.start()).pid == pid


async def test_a_hang_costs_the_child_and_the_others_are_not_to_blame(script: WriteScript) -> None:
    script({"prompt": "hang", "do": "hang"}, SLOW)
    async with make_process(cancel_grace_seconds=0.2) as process:
        pid = (await process.start()).pid
        other, hung = await begin(process), await begin(process, prompt="hang")
        hung.cancel()

        await asyncio.wait((hung, other), timeout=PATIENCE)
        assert hung.cancelled()
        assert isinstance(other.exception(), EngineReplacedError)
        assert (has_vanished(pid), process.is_alive) == (True, False)


async def test_a_hung_child_is_ended_even_when_nobody_waits_for_it_any_more(
    script: WriteScript,
) -> None:
    script({"do": "hang"})
    async with make_process(cancel_grace_seconds=0.2) as process:
        pid = (await process.start()).pid
        hung = await begin(process)
        for _ in range(2):
            hung.cancel()
            await asyncio.sleep(0.01)

        assert hung.cancelled()
        assert await asyncio.to_thread(has_vanished, pid)


async def test_a_stopped_child_is_ended_by_a_cancel(script: WriteScript) -> None:
    script(SLOW)
    async with make_process(cancel_grace_seconds=0.1) as process:
        pid = (await process.start()).pid
        running = await begin(process)
        os.kill(pid, signal.SIGSTOP)
        running.cancel()

        await asyncio.wait((running,), timeout=PATIENCE)
        assert running.cancelled()
        assert has_vanished(pid)


# crashes


@pytest.mark.parametrize(
    ("rule", "sentence"),
    [
        (
            {"do": "kill"},
            r"The engine's process was killed by SIGKILL \(often the kernel's out-of-memory killer\)\.",
        ),
        ({"do": "exit", "exit_code": 3}, r"The engine's process exited with code 3\."),
    ],
)
async def test_a_child_that_dies_says_how(
    process: EngineProcess, script: WriteScript, rule: dict[str, object], sentence: str
) -> None:
    script(rule)

    with pytest.raises(EngineCrashedError, match=f"^{sentence}$"):
        await process.generate(make_request(), ignore)

    assert not process.is_alive


async def test_a_lost_device_crashes_every_generation_in_the_child_in_its_words(
    process: EngineProcess, script: WriteScript
) -> None:
    script(
        {
            "prompt": "poison",
            "do": "raise",
            "message": "CUDA error: device-side assert triggered\nCompile with",
        },
        SLOW,
    )
    other, first = await begin(process), process.pid
    poison = process.generate(make_request(prompt="poison"), ignore)

    outcomes = await asyncio.gather(poison, other, return_exceptions=True)
    words = "The engine's process has lost its device (RuntimeError: CUDA error: device-side assert triggered)."
    assert [str(outcome) for outcome in outcomes] == [words] * 2
    assert {type(outcome) for outcome in outcomes} == {EngineCrashedError}
    assert (await process.start()).pid != first


async def test_a_segfault_crashes_every_generation_in_the_child(
    process: EngineProcess, script: WriteScript
) -> None:
    script(SLOW)
    tasks = [await begin(process, generation_id=name) for name in "abc"]

    os.kill(pid_of(process), signal.SIGSEGV)

    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    assert [str(outcome) for outcome in outcomes] == [
        "The engine's process was killed by SIGSEGV."
    ] * 3
    assert {type(outcome) for outcome in outcomes} == {EngineCrashedError}


async def test_a_generation_that_waited_for_a_slot_is_not_to_blame_for_the_crash(
    script: WriteScript,
) -> None:
    script(SLOW)
    async with make_process(slots=1) as process:
        await process.start()
        running = await begin(process)
        waiting = asyncio.create_task(process.generate(make_request(), ignore))
        await asyncio.sleep(0)
        os.kill(pid_of(process), signal.SIGKILL)

        outcomes = await asyncio.gather(running, waiting, return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [EngineCrashedError, EngineReplacedError]


async def test_audio_of_an_impossible_shape_leaves_its_generation_to_the_end_of_the_child(
    process: EngineProcess, script: WriteScript
) -> None:
    script(SLOW)
    running = await begin(process)
    assert process._calls is not None
    with pytest.raises(ValueError, match="reshape"):
        process._calls.receive(Finished(0, [3], 8_000, {}, bytearray(4)))

    os.kill(pid_of(process), signal.SIGKILL)

    with pytest.raises(EngineCrashedError):
        await asyncio.wait_for(running, PATIENCE)


async def test_start_replaces_a_crashed_child(process: EngineProcess, script: WriteScript) -> None:
    script({"attempts": [1], "do": "kill"})
    first_pid = process.pid
    with pytest.raises(EngineCrashedError):
        await process.generate(make_request(attempt=1), ignore)

    assert (await process.start()).pid not in (None, first_pid)
    assert (await process.generate(make_request(attempt=2), ignore)).duration == 0.08


async def test_a_generation_cancelled_while_its_child_dies_is_cancelled(
    process: EngineProcess, script: WriteScript
) -> None:
    script(SLOW)
    running = await begin(process)

    os.kill(pid_of(process), signal.SIGKILL)
    running.cancel()

    await asyncio.wait((running,), timeout=PATIENCE)
    assert running.cancelled()


async def test_what_libraries_print_goes_to_stderr(process: EngineProcess) -> None:
    stdout, stderr = (os.readlink(f"/proc/{process.pid}/fd/{number}") for number in (1, 2))  # noqa: PTH115

    assert stdout == stderr == os.readlink("/proc/self/fd/2")  # noqa: PTH115


async def test_terminals_and_supervisors_do_not_reach_the_child(process: EngineProcess) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        os.kill(pid_of(process), number)

    assert (await process.generate(make_request(), ignore)).duration == 0.08
    assert os.getsid(pid_of(process)) == process.pid


async def test_a_child_that_has_just_started_ignores_them_too() -> None:
    async with make_process() as process:
        starting = await begin_start(process)
        await ignoring(pid_of(process), signal.SIGQUIT)
        assert (
            "numpy" not in Path(f"/proc/{process.pid}/maps").read_text()
        )  # nor anything else that takes long to import
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
            os.kill(pid_of(process), number)

        assert (await starting).pid == process.pid


async def ignoring(pid: int, number: signal.Signals) -> None:
    """Return once the process ignores this signal; long before it has imported what it needs."""
    bit = 1 << (number - 1)
    while not _ignored(pid) & bit:
        await asyncio.sleep(0.001)


def _ignored(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("SigIgn")), 16)


PARENT = """
import asyncio
from tests.inference.factories import begin, make_process

async def main():
    async with make_process() as process:
        await process.start()
        await begin(process)
        print(process.pid, flush=True)
        await asyncio.Event().wait()

asyncio.run(main())
"""


@pytest.mark.parametrize("do", ["wait", "hang"])
def test_the_child_vanishes_with_its_parent(script: WriteScript, do: str) -> None:
    script({"do": do, "seconds": 600})
    root = Path(__file__).parents[2]
    with subprocess.Popen(
        [sys.executable, "-c", PARENT], cwd=root, stdout=subprocess.PIPE
    ) as parent:
        assert parent.stdout is not None
        child_pid = int(parent.stdout.readline())

        parent.kill()

        assert has_vanished(child_pid)


async def test_a_child_that_closes_its_channel_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = "import os, sys, time; os.close(int(sys.argv[4])); time.sleep(600)"
    monkeypatch.setattr(sys, "executable", write_impostor(tmp_path, code))
    monkeypatch.setattr(child_process, "_REMAINING_MESSAGES_SECONDS", 0.1)

    async with make_process() as process:
        with pytest.raises(EngineUnavailableError, match="closed its channel but did not end"):
            await process.start()


async def test_what_the_engine_started_dies_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fifo = tmp_path / "pid"
    os.mkfifo(fifo)
    code = f"import subprocess, time; print(subprocess.Popen(['sleep', '600']).pid, file=open({str(fifo)!r}, 'w'))"
    monkeypatch.setattr(sys, "executable", write_impostor(tmp_path, f"{code}; time.sleep(600)"))
    async with make_process() as process:
        starting = await begin_start(process)
        helper_pid = int(await asyncio.to_thread(fifo.read_text))
        starting.cancel()

    assert has_vanished(helper_pid)


# close


async def test_close_ends_the_child_for_good(process: EngineProcess) -> None:
    pid = pid_of(process)

    await process.close()
    await process.close()

    assert (has_vanished(pid), process.is_alive, process.pid) == (True, False, None)
    with pytest.raises(EngineUnavailableError, match="was closed"):
        await process.start()


async def test_close_is_not_the_fault_of_what_still_runs(
    process: EngineProcess, script: WriteScript
) -> None:
    script(SLOW)
    running = await begin(process)

    await process.close()

    with pytest.raises(EngineReplacedError, match=r"^The engine's process was closed\.$"):
        await running


@pytest.mark.usefixtures("stuck_interpreter")
async def test_close_ends_a_child_that_is_loading() -> None:
    process = make_process()
    starting = await begin_start(process)

    await process.close()

    with pytest.raises(EngineUnavailableError, match="its process was closed"):
        await starting


@pytest.mark.usefixtures("stuck_interpreter")
async def test_close_does_not_wait_for_ever_for_a_child_that_nothing_can_kill(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(process_module, "_CLOSE_SECONDS", 0.1)
    process = make_process()
    starting = await begin_start(process)
    pid = pid_of(process)
    with monkeypatch.context() as patch, anyio.fail_after(PATIENCE):
        patch.setattr(os, "killpg", lambda *_: None)
        await process.close()

    assert "was killed and has not ended" in caplog.text
    os.killpg(pid, signal.SIGKILL)
    with pytest.raises(EngineUnavailableError):
        await starting


async def test_nothing_is_left_behind(script: WriteScript) -> None:
    script({"prompt": "kill", "do": "kill"})
    before = set(os.listdir("/proc/self/fd"))  # noqa: PTH208

    async with make_process() as process:
        for prompt in ("kill", "rain", "kill"):
            await process.start()
            await asyncio.gather(
                process.generate(make_request(prompt=prompt), ignore), return_exceptions=True
            )
    gc.collect()

    assert set(os.listdir("/proc/self/fd")) == before  # noqa: PTH208
    assert asyncio.all_tasks() == {asyncio.current_task()}


# a limit on its memory


def limit_memory(process: EngineProcess, spare_bytes: int) -> None:
    """Let the child have so much more address space than it has, as ``ulimit -v`` does."""
    pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + spare_bytes
    resource.prlimit(pid_of(process), resource.RLIMIT_AS, (limit, limit))


@pytest.mark.parametrize("spare_bytes", [0, 2**20, 40 * 2**20])
async def test_a_child_without_memory_says_so_of_each_generation_and_lives(
    process: EngineProcess, spare_bytes: int
) -> None:
    limit_memory(process, spare_bytes)

    for _ in range(3):
        with pytest.raises(
            EngineError, match=r"^There is no memory for this generation .*; use a smaller model"
        ):
            await process.generate(make_request(duration=300), ignore)

    assert process.is_alive


# speed comes from the environment of the worker


SECRETS = [
    "DATABASE_URL",
    "DGX_MUSIC_DATABASE_URL",
    "DGX_MUSIC_REPLICA_URL",
    "PGPASSWORD",
    "PGPASSFILE",
    "AWS_SECRET_ACCESS_KEY",
    "AZURE_STORAGE_ACCOUNT_KEY",
    "GOOGLE_APPLICATION_CREDENTIALS",
    "SOMEBODYS_API_KEY",
]


async def test_the_child_gets_none_of_the_workers_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in SECRETS:
        monkeypatch.setenv(name, f"secret of {name}")

    async with make_process() as process:
        await process.start()
        environment = Path(f"/proc/{process.pid}/environ").read_text()

    assert [name for name in SECRETS if name in environment] == []
    assert "secret" not in environment


NEEDED = [
    "HF_HOME",
    "HTTPS_PROXY",
    "no_proxy",
    "CUDA_VISIBLE_DEVICES",
    "OMP_NUM_THREADS",
    "XDG_CACHE_HOME",
    "LC_ALL",
]
NEEDED += [
    "CC",
    "CXX",
    "CFLAGS",
    "CPPFLAGS",
    "CXXFLAGS",
    "LDFLAGS",
    "CPLUS_INCLUDE_PATH",
    "TMP",
    "TEMP",
]


async def test_the_child_gets_what_its_libraries_need(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NEEDED:
        monkeypatch.setenv(name, "1")

    async with make_process() as process:
        await process.start()
        environment = Path(f"/proc/{process.pid}/environ").read_text().split("\0")

    assert {f"{name}=1" for name in NEEDED} | {f"PATH={os.environ['PATH']}"} <= {*environment}


async def test_the_child_gets_no_secret_whatever_its_name_begins_with(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in (
        "NVIDIA_API_KEY",
        "LD_SDK_KEY",
        "PYTHONANYWHERE_API_TOKEN",
        "GPU_CLOUD_SECRET",
        "XDG_PASSWORD",
    ):
        monkeypatch.setenv(name, "hunter2")
    monkeypatch.setenv("HF_TOKEN", "for the hub")

    async with make_process() as process:
        await process.start()
        environment = Path(f"/proc/{process.pid}/environ").read_text()

    assert ("hunter2" in environment, "HF_TOKEN=for the hub" in environment) == (False, True)


async def test_the_tone_engines_variables_get_to_the_child(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SPEED_VARIABLE, "quick")
    monkeypatch.delenv(SCRIPT_VARIABLE, raising=False)

    async with make_process() as process:
        with pytest.raises(
            EngineUnavailableError, match="DGX_MUSIC_TONE_SPEED is 'quick'; use a number above 0"
        ):
            await process.start()


async def test_clips_get_to_the_engine(process: EngineProcess) -> None:
    start = Audio(np.linspace(-1, 1, 8_000, dtype=np.float32)[None, :], 8_000)
    tune = Audio(np.zeros((1, 4_000), dtype=np.float32), 8_000)
    await process.start("musicgen-melody")

    audio = await process.generate(
        make_request(model="musicgen-melody", duration=1.5, continuation=start, melody=tune), ignore
    )

    assert (audio.samples.shape, audio.facts["melody_seconds"]) == ((1, 12_000), 0.5)
    np.testing.assert_array_equal(audio.samples[:, :8_000], start.samples)
