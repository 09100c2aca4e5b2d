"""How the slots' steps reach the device: one at a time on a CPU, as captured CUDA graphs of several on a GPU.

A step of MusicGen is several hundred small kernels. Launched one by one they take a host longer than the GPU needs for
them, so the GPU path records a whole launch once and replays it. A recording has fixed shapes and addresses: `fit` rounds
what the rows need up to one of a few plans, each of which is recorded when it comes for the second time. The first time it
runs as it is, which is also the warm-up that a capture asks for.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

STEPS_PER_LAUNCH = 8
"""Of a GPU: the host then has a millisecond or more for what it does between launches."""
_LENGTH_STEP = 128
"""What is attended to is rounded up to this many positions: twelve plans for a clip of 30 s."""
TEXT_STEP = 32
"""Room for text grows by so many tokens: each time it does, what was recorded before is of no use any more."""
_LAUNCHES_AHEAD = 2
"""So many wait on the device while the host goes on: enough to keep it busy, few enough for a cancel to be quick."""


class Plan(NamedTuple):
    """The shape of a launch; everything else about it is on the device."""

    rows: int
    halves: int
    text_halves: int
    text_length: int
    is_text_ragged: bool
    filled: int
    """How much of the cache is read."""
    is_ragged: bool
    """True where the cache that is read must be masked by each row's own position."""
    widest: int
    """Among how many tokens is chosen."""
    steps: int


Advance = Callable[[Plan], None]


class Launcher(Protocol):
    """Makes steps on a device, in a stream of its own where the device has such."""

    def fit(self, plan: Plan, slot_count: int, max_positions: int) -> Plan:
        """Return the plan to launch for what the rows need: at least as much of everything."""

    def launch(self, plan: Plan) -> None:
        """Make the plan's steps."""

    def forget(self) -> None:
        """Drop what was recorded: addresses have changed."""

    def on_stream(self, *borrowed: Tensor | None) -> AbstractContextManager[object]:
        """Return a context whose work is in order with the steps; what is borrowed from another stream outlives it."""


def make_launcher(advance: Advance, device: torch.device) -> Launcher:
    """Return what suits the device."""
    return GraphLauncher(advance, device) if device.type == "cuda" else EagerLauncher(advance)


class EagerLauncher:
    """One step at a time, in exactly the shapes that are needed."""

    def __init__(self, advance: Advance) -> None:
        self._advance = advance

    def fit(self, plan: Plan, slot_count: int, max_positions: int) -> Plan:
        """Return the plan as it is."""
        return plan

    def launch(self, plan: Plan) -> None:
        """Make the plan's steps."""
        self._advance(plan)

    def forget(self) -> None:
        """Nothing is recorded."""

    def on_stream(self, *borrowed: Tensor | None) -> AbstractContextManager[object]:
        """Return a context that does nothing."""
        return nullcontext()


class GraphLauncher:
    """CUDA graphs, one for each plan, in one stream and one pool of memory."""

    def __init__(self, advance: Advance, device: torch.device) -> None:
        self._advance = advance
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()
        self._graphs: dict[Plan, torch.cuda.CUDAGraph | None] = {}
        self._under_way: deque[torch.cuda.Event] = deque()

    def fit(self, plan: Plan, slot_count: int, max_positions: int) -> Plan:
        """Return the smallest of the plans that are recorded which is enough."""
        return bucket(plan, slot_count, max_positions)

    def launch(self, plan: Plan) -> None:
        """Make the plan's steps, once the device has few enough before it; never waits for a result."""
        if len(self._under_way) == _LAUNCHES_AHEAD:
            self._under_way.popleft().synchronize()
        self._run(plan)
        self._under_way.append(self._stream.record_event())

    def _run(self, plan: Plan) -> None:
        if plan not in self._graphs:
            self._graphs[plan] = None
            self._advance(plan)
            return
        graph = self._graphs[plan]
        if graph is None:
            graph = self._graphs[plan] = self._record(plan)
        graph.replay()

    def _record(self, plan: Plan) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        # Other threads allocate for the text and the codec meanwhile, which must not break the capture.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            self._advance(plan)
        return graph

    def forget(self) -> None:
        """Drop all recordings, once what was launched has been done."""
        self._stream.synchronize()
        self._graphs.clear()

    def on_stream(self, *borrowed: Tensor | None) -> AbstractContextManager[object]:
        """Return a context for the steps' stream; it waits for what made the borrowed tensors, and for nothing else."""
        if borrowed:
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
        for tensor in borrowed:
            if tensor is not None and tensor.is_cuda:
                tensor.record_stream(self._stream)
        return torch.cuda.stream(self._stream)


def bucket(plan: Plan, slot_count: int, max_positions: int) -> Plan:
    """Return the plan of several steps, with every number rounded up so that few different plans come up.

    Rows go up to a power of two, what is attended to to a multiple of 128, the choice of tokens to a power of two; masks
    hide what is too much.
    """
    filled = plan.filled + STEPS_PER_LAUNCH - 1
    return plan._replace(
        rows=min(_power_of_two(plan.rows), slot_count),
        text_length=round_up(plan.text_length, TEXT_STEP),
        is_text_ragged=True,
        filled=min(round_up(filled, _LENGTH_STEP), max_positions),
        is_ragged=True,
        widest=_power_of_two(plan.widest),
        steps=STEPS_PER_LAUNCH,
    )


def round_up(number: int, step: int) -> int:
    """Return the smallest multiple of the step that is at least the number."""
    return -(-number // step) * step


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()
