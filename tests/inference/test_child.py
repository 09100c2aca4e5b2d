"""The child's side, seen from the other end of its channel."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from dgx_music.errors import EngineUnavailableError, GenerationCancelledError
from dgx_music.inference import child
from dgx_music.inference.channel import Decoder, Message, encode
from dgx_music.inference.child import Channel, ChannelRun
from dgx_music.inference.engine import Audio, Engine, EngineSettings, GenerationRequest, Run
from tests.inference.conftest import WriteScript
from tests.inference.factories import make_request, make_settings
from tests.inference.test_process import has_vanished

Generate = Callable[[GenerationRequest, Run], Audio]


class ScriptedEngine:
    slots = 2
    device = "cpu"
    model_version = "scripted"
    notice = None

    def __init__(self, generate: Generate) -> None:
        self.generate = generate


class Parent:
    """The other end of the channel of a child that runs in a thread."""

    def __init__(self, connection: socket.socket) -> None:
        connection.settimeout(20)
        self.connection = connection
        self._decoder = Decoder()
        self._received: list[Message] = []

    def send(self, **header: Any) -> None:
        self.connection.sendall(encode(header))

    def receive(self) -> Message:
        while not self._received:
            self._received += self._decoder.feed(self.connection.recv(65_536))
        return self._received.pop(0)


@pytest.fixture
def connect(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Generate], Parent]]:
    """Serves an engine with the ``generate`` that is given; returns its parent's end after ``ready``."""
    ours, theirs = socket.socketpair()

    def start(generate: Generate) -> Parent:
        monkeypatch.setattr(child, "load_engine", lambda settings: ScriptedEngine(generate))
        thread.start()
        parent = Parent(ours)
        assert parent.receive().header["kind"] == "ready"
        return parent

    thread = threading.Thread(target=lambda: child.load_and_serve(make_settings(), Channel(theirs)))
    with theirs, ours:
        yield start
        ours.shutdown(socket.SHUT_RDWR)
        thread.join(5)
    assert not thread.is_alive()


def silence(request: GenerationRequest, run: Run) -> Audio:
    return Audio(np.zeros((2, 3), dtype=np.float64), 8_000, {"seed": 7})


def wait_for_cancel(request: GenerationRequest, run: Run) -> Audio:
    run.report_progress(0.5)
    while True:
        run.check_cancelled()


def test_audio_travels_as_float32_with_its_shape(connect: Callable[[Generate], Parent]) -> None:
    parent = connect(silence)

    parent.send(kind="generate", key=1, request=vars(make_request()))

    header, payload = parent.receive()
    assert header == {"kind": "audio", "key": 1, "shape": [2, 3], "sample_rate": 8_000, "facts": {"seed": 7}}
    assert payload == bytes(2 * 3 * 4)


def test_a_cancel_stops_the_generation_it_names(connect: Callable[[Generate], Parent]) -> None:
    parent = connect(wait_for_cancel)
    for key in (1, 2):
        parent.send(kind="generate", key=key, request=vars(make_request()))
        assert parent.receive().header["kind"] == "progress"

    parent.send(kind="cancel", key=2)
    reply = parent.receive().header

    assert (reply["kind"], reply["key"], reply["error"]) == ("failed", 2, "GenerationCancelledError")
    parent.send(kind="cancel", key=1)
    assert parent.receive().header["key"] == 1


def test_a_cancel_that_comes_too_late_is_nothing(connect: Callable[[Generate], Parent]) -> None:
    parent = connect(silence)
    parent.send(kind="generate", key=1, request=vars(make_request()))
    parent.receive()

    parent.send(kind="cancel", key=1)
    parent.send(kind="generate", key=2, request=vars(make_request()))

    assert parent.receive().header["key"] == 2


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
        (return_facts_that_are_not_json, "TypeError: Object of type float32 is not JSON serializable"),
        (raise_unavailable, "The device is gone."),
    ],
)
def test_whatever_goes_wrong_is_answered(
    connect: Callable[[Generate], Parent], generate: Generate, message: str
) -> None:
    parent = connect(generate)

    parent.send(kind="generate", key=1, request=vars(make_request()))

    header = parent.receive().header
    assert header == {"kind": "failed", "key": 1, "error": "EngineError", "message": message}


def test_a_request_that_is_unacceptable_is_answered(connect: Callable[[Generate], Parent]) -> None:
    parent = connect(silence)

    parent.send(kind="generate", key=1, request={**vars(make_request()), "top_k": -1})

    assert parent.receive().header["message"].startswith("InvalidRequestError: top_k is -1")


@pytest.mark.parametrize(
    ("error", "message"),
    [(EngineUnavailableError("No weights."), "No weights."), (ImportError("no torch"), "ImportError: no torch")],
)
def test_an_engine_that_does_not_load_says_why(monkeypatch: pytest.MonkeyPatch, error: Exception, message: str) -> None:
    def load_engine(settings: EngineSettings) -> Engine:
        raise error

    monkeypatch.setattr(child, "load_engine", load_engine)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        child.load_and_serve(make_settings(), Channel(theirs))

        assert Parent(ours).receive().header == {"kind": "unavailable", "message": message}


class RecordingChannel(Channel):
    def __init__(self) -> None:
        self.sent: list[bytes] = []

    def send(self, message: bytes) -> None:
        self.sent.append(message)


def test_progress_is_sent_at_once_and_then_at_most_twice_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(child.time, "monotonic", lambda: now)
    channel = RecordingChannel()
    run = ChannelRun(1, channel)

    for now in (100.0, 100.25, 100.49, 100.51, 101.0, 101.02):
        run.report_progress(now - 100)

    assert len(channel.sent) == 3


def test_a_run_is_cancelled_for_ever() -> None:
    run = ChannelRun(1, RecordingChannel())
    run.check_cancelled()
    run.cancel()

    for _ in range(2):
        with pytest.raises(GenerationCancelledError):
            run.check_cancelled()


# the real process


def child_command(connection: socket.socket) -> list[str]:
    settings = '{"engine": "tone", "model": "musicgen-small"}'
    return [sys.executable, "-m", "dgx_music.inference.child", str(connection.fileno()), settings]


def test_the_end_of_the_channel_ends_the_process_in_mid_generation(script: WriteScript) -> None:
    script({"do": "hang"})
    ours, theirs = socket.socketpair()
    with theirs, ours, subprocess.Popen(child_command(theirs), pass_fds=(theirs.fileno(),)) as process:
        parent = Parent(ours)
        parent.receive()
        parent.send(kind="generate", key=1, request=vars(make_request()))
        assert parent.receive().header["kind"] == "progress"

        ours.shutdown(socket.SHUT_RDWR)

        assert process.wait(5) == 0


FOSTER_PARENT = """
import subprocess, sys, time

subprocess.Popen(sys.argv[2:], pass_fds=(int(sys.argv[1]),))
time.sleep(60)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG is Linux's")
def test_the_death_of_the_parent_ends_the_process_though_the_channel_is_open(script: WriteScript) -> None:
    script()
    ours, theirs = socket.socketpair()
    command = [sys.executable, "-c", FOSTER_PARENT, str(theirs.fileno()), *child_command(theirs)]
    with ours, theirs, subprocess.Popen(command, pass_fds=(theirs.fileno(),)) as parent:
        pid = Parent(ours).receive().header["info"]["pid"]

        parent.kill()

        assert has_vanished(pid)
