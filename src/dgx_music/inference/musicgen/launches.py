"""How the slots' steps reach the device: one at a time on a CPU, as captured CUDA graphs of several on a GPU.

A step of MusicGen is several hundred small kernels. Launched one by one they take a host longer than the GPU needs for
them, so the GPU path records a step once and replays it. A recording has fixed shapes and addresses: `fit` rounds what
the rows need up to one of a few plans. The first step of a plan runs as it is, which is also the warm-up that a recording
asks for; the second one is recorded.
"""

from __future__ import annotations

import logging
import weakref
from collections import defaultdict, deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from dgx_music.inference.trouble import RECORDING, first_line, has_lost_the_device, is_out_of_memory

STEPS_PER_LAUNCH = 8
"""Of a GPU: the host then has a millisecond or more for what it does between launches."""
_LENGTH_STEP = 128
"""What is attended to is rounded up to this many positions: twelve plans for a clip of 30 s. With a kernel that finds each
row's position on the device it is always all of them: one plan."""
TEXT_STEP = 32
"""What is read of a text is rounded up to so many tokens, and the room for it is at least that. Each time the room grows, what
was recorded before is of no use any more."""
USUAL_TEXT = 128
"""Room that is never given back; what a longer text has taken goes with the last row, or one would cost all slots for ever."""
_WIDE, _ALL = 256, 1 << 30
"""Among how many tokens a launch chooses."""
_ROW_COUNTS = (1, 2, 4, 8, 12, 16, 20, 24, 28, 32, 48, 64)
"""Numbers of rows for which steps are recorded; beyond them, multiples of 64."""
_MOST_GRAPHS = 128
"""Each holds several hundred kernels; the plan that has not come up for longest is recorded anew when it does."""
_LAUNCHES_AHEAD = 2
"""So many wait on the device while the host goes on: enough to keep it busy, few enough for a cancel to be quick."""

logger = logging.getLogger(__name__)


class Span(NamedTuple):
    """Neighbouring rows that attend to equally much."""

    start: int
    stop: int
    length: int
    is_masked: bool
    """True where not all of the length is there for each of them."""


class Plan(NamedTuple):
    """The shape of a launch; everything else about it is on the device."""

    rows: int
    halves: int
    text_halves: int
    reach: tuple[Span, ...]
    """How much of the cache is read."""
    texts: tuple[Span, ...]
    """How much of the text is read."""
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


_idle_streams: defaultdict[tuple[torch.device, int], list[torch.cuda.Stream]] = defaultdict(list)


def borrow_stream(owner: object, device: torch.device, priority: int = 0) -> torch.cuda.Stream | None:
    """Return a stream that nobody else has for as long as the owner lives; ``None`` on a device that has no streams.

    torch makes 32 of a kind and then hands out the first again, though another engine may still be recording on it. Of two
    priorities the lower number goes first.
    """
    if device.type != "cuda":
        return None
    idle = _idle_streams[device, priority]
    try:
        stream = idle.pop()
    except IndexError:
        stream = torch.cuda.Stream(device, priority=priority)  # type: ignore[no-untyped-call]
    weakref.finalize(owner, idle.append, stream)
    return stream


def make_launcher(advance: Advance, stream: torch.cuda.Stream | None) -> Launcher:
    """Return what suits the device: a GPU has a stream."""
    return EagerLauncher(advance) if stream is None else GraphLauncher(advance, stream)


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

    def __init__(self, advance: Advance, stream: torch.cuda.Stream) -> None:
        self._advance = advance
        self._stream = stream
        self._pool = torch.cuda.graph_pool_handle()
        self._graphs: dict[Plan, torch.cuda.CUDAGraph | None] = {}  # the least recently used first
        self._unrecordable: set[Plan] = set()
        self._under_way: deque[torch.cuda.Event] = deque()

    def fit(self, plan: Plan, slot_count: int, max_positions: int) -> Plan:
        """Return the smallest of the plans that are recorded which is enough."""
        return bucket(plan, slot_count, max_positions)

    def launch(self, plan: Plan) -> None:
        """Make the plan's steps, once the device has few enough before it; never waits for a result."""
        if len(self._under_way) == _LAUNCHES_AHEAD:
            self._under_way.popleft().synchronize()
        for _ in range(plan.steps):
            self._step(plan._replace(steps=1))
        done = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        done.record(self._stream)
        self._under_way.append(done)

    def _step(self, plan: Plan) -> None:
        is_warm = plan in self._graphs
        graph = self._graphs.pop(plan, None)
        if graph is None and is_warm and plan not in self._unrecordable:
            graph = self._record(plan)
        self._graphs[plan] = graph
        if len(self._graphs) > _MOST_GRAPHS:
            del self._graphs[next(iter(self._graphs))]
        if graph is None:
            self._advance(plan)
        else:
            graph.replay()

    def _record(self, plan: Plan) -> torch.cuda.CUDAGraph | None:
        """Return the recorded step, or ``None`` if it cannot be recorded: then it goes on as it is, slower."""
        graph = torch.cuda.CUDAGraph()
        try:
            with RECORDING:
                self._capture(graph, plan)
        except RuntimeError as error:
            if is_out_of_memory(error) or has_lost_the_device(error):
                raise
            logger.warning("no CUDA graph for %s: %s", plan, first_line(error))
            self._unrecordable.add(plan)
            self._pool = torch.cuda.graph_pool_handle()  # the former may be left in the middle of a recording
            return None
        return graph

    def _capture(self, graph: torch.cuda.CUDAGraph, plan: Plan) -> None:
        """Record the step, on this stream alone: ``torch.cuda.graph`` would wait for the device, which others record on.

        Other threads allocate for the text and the codec meanwhile, which ``thread_local`` allows them.
        """
        graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
        try:
            self._advance(plan)
        finally:
            graph.capture_end()

    def forget(self) -> None:
        """Drop all recordings, once what was launched has been done."""
        self._stream.synchronize()
        self._graphs.clear()
        self._unrecordable.clear()
        self._pool = torch.cuda.graph_pool_handle()  # a pool ends with its last recording
        self._under_way.clear()

    def on_stream(self, *borrowed: Tensor | None) -> AbstractContextManager[object]:
        """Return a context for the steps' stream; it waits for what made the borrowed tensors, and for nothing else."""
        if borrowed:
            self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        for tensor in borrowed:
            if tensor is not None and tensor.is_cuda:
                tensor.record_stream(self._stream)
        return torch.cuda.stream(self._stream)


def bucket(plan: Plan, slot_count: int, max_positions: int) -> Plan:
    """Return the plan of several steps, with every number rounded up so that few different plans come up.

    Rows go up to one of a dozen numbers, what attention reads to a multiple of 128, text to twice as much and twice as much
    again, the choice of tokens to 256 or all; masks hide what is too much.
    """
    rows = min(_row_count(plan.rows), slot_count)
    filled = max(span.length for span in plan.reach) + STEPS_PER_LAUNCH - 1
    text = max((span.length for span in plan.texts), default=0)
    return plan._replace(
        rows=rows,
        reach=(Span(0, rows, min(round_up(filled, _LENGTH_STEP), max_positions), is_masked=True),),
        texts=(Span(0, rows, text_room(text), is_masked=True),) if text else (),
        widest=_WIDE if plan.widest <= _WIDE else _ALL,
        steps=STEPS_PER_LAUNCH,
    )


def text_room(length: int) -> int:
    """Return how much room to make for texts of that many tokens: 32, 64, 128 and so on."""
    return max(TEXT_STEP, _power_of_two(length)) if length else 0


def round_up(number: int, step: int) -> int:
    """Return the smallest multiple of the step that is at least the number."""
    return -(-number // step) * step


def _row_count(rows: int) -> int:
    return next((count for count in _ROW_COUNTS if count >= rows), round_up(rows, _ROW_COUNTS[-1]))


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()
