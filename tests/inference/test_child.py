"""The child's side, seen from the other end of its channel."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import numpy as np
import pytest

from dgx_music.audio.samples import Audio
from dgx_music.errors import EngineReplacedError, EngineUnavailableError, GenerationCancelledError
from dgx_music.inference import child, child_channel
from dgx_music.inference.channel import Decoder, encode
from dgx_music.inference.child import Server
from dgx_music.inference.child_channel import Channel, ChannelRun
from dgx_music.inference.engine import Engine, EngineSettings, GenerationRequest, Run
from dgx_music.inference.messages import (
    Cancel,
    DeviceLost,
    Failed,
    Finished,
    Generate,
    Load,
    Progress,
    Ready,
    SlotFreed,
    SlotsReduced,
    Unavailable,
    Unloaded,
)
from tests.inference.conftest import WriteScript
from tests.inference.factories import make_request, make_settings
from tests.inference.test_process import has_vanished
from tests.patience import PATIENCE

Performer = Callable[[GenerationRequest, Run], Audio]


class ScriptedEngine:
    memory_bytes = 1
    device = "cpu"
    model_version = "scripted"
    notice = None

    def __init__(self, generate: Performer) -> None:
        self.slots = 2
        self.generate = generate
        self.is_closed = False

    def close(self) -> None:
        self.is_closed = True


class Parent:
    """The other end of the channel of a child that runs in a thread."""

    def __init__(
        self, connection: socket.socket, make_engine: Callable[[EngineSettings], Any] | None = None
    ) -> None:
        connection.settimeout(20)
        self.make_engine = make_engine
        self.connection = connection
        self._decoder = Decoder()
        self._received: list[Any] = []
        self._begun: set[int] = set()

    def send(self, message: Load | Generate | Cancel) -> None:
        self.connection.sendall(encode(message))

    def receive(self) -> Any:
        """Return the next message; of each generation's progress the first only."""
        while not self._received:
            for message in self._decoder.feed(self.connection.recv(65_536)):
                if not isinstance(message, Progress) or message.key not in self._begun:
                    self._received.append(message)
                if isinstance(message, Progress):
                    self._begun.add(message.key)
        return self._received.pop(0)

    def load(self, model: str, slots: int | None = None) -> Any:
        """Return the answer to this ``Load``."""
        self.send(Load(model, slots))
        return self.receive()

    def generate(self, key: int = 1, **fields: Any) -> None:
        self.send(Generate.of(key, make_request(**fields)))


@pytest.fixture
def connect(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Performer], Parent]]:
    """Serves engines with the ``generate`` that is given; returns its parent's end once one model is loaded."""
    ours, theirs = socket.socketpair()

    def start(generate: Performer) -> Parent:
        parent = Parent(ours, lambda settings: ScriptedEngine(generate))
        monkeypatch.setattr(child, "load_engine", lambda settings: parent.make_engine(settings))
        monkeypatch.setattr(child, "estimate_bytes", lambda settings: 1)
        thread.start()
        assert isinstance(parent.load("musicgen-small"), Ready)
        return parent

    thread = threading.Thread(target=lambda: Server(make_settings(), Channel(theirs)).serve())
    with theirs, ours:
        yield start
        ours.shutdown(socket.SHUT_RDWR)
        thread.join(PATIENCE)
    assert not thread.is_alive()


def silence(request: GenerationRequest, run: Run) -> Audio:
    return Audio(np.zeros((2, 3), dtype=np.float64), 8_000, {"seed": 7})


def wait_for_cancel(request: GenerationRequest, run: Run) -> Audio:
    while True:
        run.report_progress(0.5)
        run.check_cancelled()
        time.sleep(0.005)


def test_audio_travels_as_float32_with_its_shape(connect: Callable[[Performer], Parent]) -> None:
    parent = connect(silence)

    parent.generate()

    assert parent.receive() == Finished(1, [2, 3], 8_000, {"seed": 7}, bytes(2 * 3 * 4))


def test_a_cancel_stops_the_generation_it_names(connect: Callable[[Performer], Parent]) -> None:
    parent = connect(wait_for_cancel)
    for key in (1, 2):
        parent.generate(key)
        assert isinstance(parent.receive(), Progress)

    parent.send(Cancel(2))
    reply = parent.receive()

    assert (type(reply), reply.key, reply.error) == (Failed, 2, "GenerationCancelledError")
    parent.send(Cancel(1))
    assert parent.receive().key == 1


def test_a_cancel_that_comes_too_late_is_nothing(connect: Callable[[Performer], Parent]) -> None:
    parent = connect(silence)
    parent.generate()
    parent.receive()

    parent.send(Cancel(1))
    parent.generate(2)

    assert parent.receive().key == 2


def raise_system_exit(request: GenerationRequest, run: Run) -> Audio:
    sys.exit("no way")


def return_facts_that_are_not_json(request: GenerationRequest, run: Run) -> Audio:
    return Audio(np.zeros((1, 1), dtype=np.float32), 8_000, {"seed": np.float32(1)})


def raise_unavailable(request: GenerationRequest, run: Run) -> Audio:
    raise EngineUnavailableError("The device is gone.")


@pytest.mark.parametrize(
    ("generate", "message"),
    [
        (raise_system_exit, "SystemExit: no way"),
        (
            return_facts_that_are_not_json,
            "TypeError: Object of type float32 is not JSON serializable",
        ),
        (raise_unavailable, "The device is gone."),
    ],
)
def test_whatever_goes_wrong_is_answered(
    connect: Callable[[Performer], Parent], generate: Performer, message: str
) -> None:
    parent = connect(generate)

    parent.generate()

    assert parent.receive() == Failed(1, "EngineError", message)


def test_a_request_that_is_unacceptable_is_answered(connect: Callable[[Performer], Parent]) -> None:
    parent = connect(silence)

    parent.send(Generate(1, {**vars(make_request()), "top_k": -1}, {}, b""))

    assert parent.receive().message.startswith("InvalidRequestError: top_k is -1")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (EngineUnavailableError("No weights."), "No weights."),
        (ImportError("no torch"), "ImportError: no torch"),
    ],
)
def test_an_engine_that_does_not_load_says_why_and_leaves_the_others_alone(
    connect: Callable[[Performer], Parent],
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    message: str,
) -> None:
    def load_engine(settings: EngineSettings) -> Engine:
        raise error

    parent = connect(silence)
    parent.make_engine = load_engine

    assert parent.load("musicgen-medium") == Unavailable("musicgen-medium", message)
    parent.generate()
    assert isinstance(parent.receive(), Finished)


class RecordingChannel(Channel):
    def __init__(self) -> None:
        self.sent: list[bytes] = []

    def send(self, message: bytes) -> None:
        self.sent.append(message)

    def offer(self, message: bytes) -> bool:
        self.send(message)
        return True


def test_progress_is_sent_at_once_and_then_at_most_twice_a_second(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 100.0
    monkeypatch.setattr(child_channel.time, "monotonic", lambda: now)
    channel = RecordingChannel()
    run = ChannelRun(1, channel, lambda: False)

    for now in (100.0, 100.25, 100.49, 100.51, 101.0, 101.02):
        run.report_progress(now - 100)

    assert len(channel.sent) == 3


def test_progress_that_was_dropped_is_sent_with_the_next_step() -> None:
    channel = RecordingChannel()
    taken = [True, False, False]
    channel.offer = lambda message: channel.send(message) or taken.pop()  # type: ignore[method-assign]
    run = ChannelRun(1, channel, lambda: False)

    for _ in range(9):
        run.report_progress(0.5)

    assert len(channel.sent) == 3


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    ours.settimeout(20)
    with theirs, ours:
        yield ours, theirs


def test_an_offered_message_arrives_if_nobody_is_busy(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    assert Channel(pair[1]).offer(b"progress")
    assert pair[0].recv(99) == b"progress"


def test_an_offer_waits_neither_for_a_busy_parent_nor_for_another_message(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    channel, audio = Channel(pair[1]), bytes(4_000_000)
    sending = threading.Thread(target=channel.send, args=(audio,))
    sending.start()
    received = len(pair[0].recv(1))  # it is under way, and more than fits
    assert not channel.offer(b"progress")
    while received < len(audio):
        received += len(pair[0].recv(65_536))
    sending.join(PATIENCE)
    assert channel.offer(b"progress")
    assert pair[0].recv(99) == b"progress"


def test_an_offer_does_not_wait_if_the_socket_is_full(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    pair[1].setblocking(False)
    with suppress(BlockingIOError):
        while True:
            pair[1].send(bytes(65_536))
    pair[1].setblocking(True)
    assert not Channel(pair[1]).offer(b"progress")


def test_an_offer_raises_if_the_parent_is_gone(pair: tuple[socket.socket, socket.socket]) -> None:
    pair[0].close()
    with pytest.raises(ConnectionError):
        Channel(pair[1]).offer(b"progress")


def test_a_run_is_cancelled_for_ever() -> None:
    run = ChannelRun(1, RecordingChannel(), lambda: False)
    run.check_cancelled()
    run.cancel()

    for _ in range(2):
        with pytest.raises(GenerationCancelledError):
            run.check_cancelled()


# slots


def free_slot_and_wait(request: GenerationRequest, run: Run) -> Audio:
    for _ in range(2):
        run.free_slot()
    return wait_for_cancel(request, run)


def test_a_slot_is_freed_once_before_the_audio_is_made(
    connect: Callable[[Performer], Parent],
) -> None:
    parent = connect(free_slot_and_wait)
    parent.generate()

    assert parent.receive() == SlotFreed(1)
    assert isinstance(parent.receive(), Progress)
    parent.send(Cancel(1))
    assert parent.receive().error == "GenerationCancelledError"


def test_more_generations_than_slots_run_if_slots_were_freed(
    connect: Callable[[Performer], Parent],
) -> None:
    parent = connect(free_slot_and_wait)
    for key in range(4):
        parent.generate(key)

    kinds = [type(parent.receive()) for _ in range(8)]
    assert sorted(kinds, key=str) == [Progress] * 4 + [SlotFreed] * 4
    for key in range(4):
        parent.send(Cancel(key))


def test_fewer_slots_are_told_once_and_before_the_failure_that_they_cost(
    connect: Callable[[Performer], Parent], monkeypatch: pytest.MonkeyPatch
) -> None:
    def shrink(request: GenerationRequest, run: Run) -> Audio:
        engine.slots = 1
        raise EngineReplacedError("no memory for as many")

    engine = ScriptedEngine(shrink)
    parent = connect(silence)
    parent.make_engine = lambda settings: engine
    parent.load("musicgen-medium")
    for key in (1, 2):
        parent.generate(key, model="musicgen-medium")

    replies = [parent.receive() for _ in range(3)]
    assert replies[0] == SlotsReduced("musicgen-medium", 1)
    assert [(type(reply), reply.error) for reply in replies[1:]] == [
        (Failed, "EngineReplacedError")
    ] * 2


def test_the_slots_of_a_load_are_what_its_engine_is_made_with(
    connect: Callable[[Performer], Parent], monkeypatch: pytest.MonkeyPatch
) -> None:
    parent = connect(silence)
    asked: list[EngineSettings] = []
    parent.make_engine = lambda settings: asked.append(settings) or ScriptedEngine(silence)

    parent.load("musicgen-medium", slots=2)

    assert [(settings.model, settings.slots) for settings in asked] == [("musicgen-medium", 2)]


# memory


def run_out_of_memory(request: GenerationRequest, run: Run) -> Audio:
    if request.prompt == "held":
        wait_for_cancel(request, run)
    if request.prompt == "codec":
        run.free_slot()
    raise MemoryError("2 GiB\nadvice")


def test_a_generation_without_memory_is_given_back_beside_others_and_fails_alone(
    connect: Callable[[Performer], Parent],
) -> None:
    parent = connect(run_out_of_memory)
    parent.generate(1, prompt="held")
    parent.receive()

    parent.generate(2)
    beside = parent.receive()
    parent.send(Cancel(1))
    parent.receive()
    parent.generate(3)
    alone = parent.receive()

    assert (beside.error, alone.error) == ("EngineReplacedError", "EngineError")
    assert (
        beside.message
        == "There is no memory for this generation beside the others (MemoryError: 2 GiB)."
    )
    assert alone.message.endswith(
        "; use a smaller model, fewer DGX_MUSIC_SLOTS or DGX_MUSIC_DTYPE=bfloat16."
    )


def test_audio_that_does_not_fit_counts_as_a_failure_beside_others_too(
    connect: Callable[[Performer], Parent],
) -> None:
    parent = connect(run_out_of_memory)
    parent.generate(1, prompt="held")
    parent.receive()

    parent.generate(2, prompt="codec")
    freed, failed = parent.receive(), parent.receive()
    parent.send(Cancel(1))

    assert (type(freed), failed.key, failed.error) == (SlotFreed, 2, "EngineError")
    assert failed.message.startswith(
        "There is no memory for this generation (MemoryError: 2 GiB); use a smaller"
    )


def test_out_of_memory_failures_count_after_so_many_free_ones(
    connect: Callable[[Performer], Parent], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(child, "_MAX_FREE_FAILURES", 2)
    parent = connect(run_out_of_memory)
    parent.generate(0, prompt="held")
    parent.receive()
    errors = []
    for key in (1, 2, 3):
        parent.generate(key)
        errors.append(parent.receive().error)
    parent.send(Cancel(0))

    assert errors == ["EngineReplacedError"] * 2 + ["EngineError"]


def test_a_generation_without_memory_unloads_idle_engines_and_is_tried_once_more(
    connect: Callable[[Performer], Parent], monkeypatch: pytest.MonkeyPatch
) -> None:
    idle = ScriptedEngine(silence)

    def need_room(request: GenerationRequest, run: Run) -> Audio:
        return silence(request, run) if idle.is_closed else run_out_of_memory(request, run)

    parent = connect(need_room)
    parent.make_engine = lambda settings: idle
    parent.load("musicgen-medium")
    parent.load("musicgen-small")  # one thread loads: medium is not in use by it any more
    parent.generate()

    assert parent.receive() == Unloaded("musicgen-medium")
    assert isinstance(parent.receive(), Finished)
    parent.generate(2, model="musicgen-medium")
    assert parent.receive().error == "EngineReplacedError"


def test_a_resident_model_is_loaded_at_once(connect: Callable[[Performer], Parent]) -> None:
    parent = connect(silence)
    parent.load("musicgen-medium")
    parent.make_engine = None

    assert isinstance(parent.load("musicgen-small"), Ready)


def test_a_cancel_is_heard_while_another_model_loads(
    connect: Callable[[Performer], Parent], monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = threading.Event()
    parent = connect(wait_for_cancel)
    parent.make_engine = lambda settings: go_on.wait(PATIENCE) and ScriptedEngine(silence)
    parent.generate()
    parent.receive()
    parent.send(Load("musicgen-medium", None))
    parent.send(Cancel(1))

    assert parent.receive().error == "GenerationCancelledError"
    go_on.set()
    assert isinstance(parent.receive(), Ready)


# a device that is lost


def lose_the_device(request: GenerationRequest, run: Run) -> Audio:
    raise RuntimeError(
        "CUDA error: an illegal memory access was encountered\nFor debugging consider passing"
    )


def test_a_lost_device_is_told_in_one_line_and_ends_the_process(
    connect: Callable[[Performer], Parent], monkeypatch: pytest.MonkeyPatch
) -> None:
    codes: list[int] = []

    def leave(code: int) -> None:
        codes.append(code)
        sys.exit(code)  # its thread only

    monkeypatch.setattr(child, "_exit", leave)
    parent = connect(lose_the_device)
    parent.generate()

    message = "RuntimeError: CUDA error: an illegal memory access was encountered"
    assert parent.receive() == DeviceLost(message)
    while not codes:
        pass
    assert codes == [child.LOST_THE_DEVICE]


# the real process


def test_the_process_ends_with_the_code_of_a_lost_device(script: WriteScript) -> None:
    script({"do": "raise", "message": "CUDA error: unspecified launch failure"})
    ours, theirs = socket.socketpair()
    with (
        theirs,
        ours,
        subprocess.Popen(child_command(theirs), pass_fds=(theirs.fileno(),)) as process,
    ):
        parent = Parent(ours)
        parent.load("musicgen-small")
        parent.generate()

        assert isinstance(parent.receive(), DeviceLost)
        assert process.wait(PATIENCE) == child.LOST_THE_DEVICE == 70


def child_command(connection: socket.socket) -> list[str]:
    settings = '{"engine": "tone", "model": "musicgen-small"}'
    return [sys.executable, "-m", "dgx_music.inference.child", str(connection.fileno()), settings]


def test_the_end_of_the_channel_ends_the_process_in_mid_generation(script: WriteScript) -> None:
    script({"do": "hang"})
    ours, theirs = socket.socketpair()
    with (
        theirs,
        ours,
        subprocess.Popen(child_command(theirs), pass_fds=(theirs.fileno(),)) as process,
    ):
        parent = Parent(ours)
        parent.load("musicgen-small")
        parent.generate()
        assert isinstance(parent.receive(), Progress)

        ours.shutdown(socket.SHUT_RDWR)

        assert process.wait(PATIENCE) == 0


FOSTER_PARENT = """
import subprocess, sys, time

subprocess.Popen(sys.argv[2:], pass_fds=(int(sys.argv[1]),))
time.sleep(600)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG is Linux's")
def test_the_death_of_the_parent_ends_the_process_though_the_channel_is_open(
    script: WriteScript,
) -> None:
    script()
    ours, theirs = socket.socketpair()
    command = [sys.executable, "-c", FOSTER_PARENT, str(theirs.fileno()), *child_command(theirs)]
    with ours, theirs, subprocess.Popen(command, pass_fds=(theirs.fileno(),)) as parent:
        pid = Parent(ours).load("musicgen-small").info.pid

        parent.kill()

        assert has_vanished(pid)


def no_threads(*_: object) -> None:
    raise RuntimeError("can't start new thread")


def test_a_generation_is_answered_once_if_no_thread_can_be_started(
    connect: Callable[[Performer], Parent], monkeypatch: pytest.MonkeyPatch
) -> None:
    parent = connect(silence)
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", no_threads)
        parent.generate(1)
        assert parent.receive().message.startswith("There is no memory for this generation")

    parent.generate(2)
    parent.generate(3)

    assert {parent.receive().key for _ in range(2)} == {2, 3}


def test_a_load_is_answered_once_if_no_thread_can_be_started() -> None:
    class NoThread:
        def submit(self, *_: object) -> None:
            no_threads()

    ours, theirs = socket.socketpair()
    server = Server(make_settings(), Channel(theirs))
    server._begin_load(NoThread(), "musicgen-large", None)  # type: ignore[arg-type]
    server._load("musicgen-large", None)  # what was submitted and runs in a later thread
    theirs.close()
    (message,) = Decoder().feed(ours.recv(65_536))
    assert isinstance(message, Unavailable)
    assert (
        message.message == "There is no memory to load it (RuntimeError: can't start new thread)."
    )
    assert ours.recv(1) == b""
    ours.close()
