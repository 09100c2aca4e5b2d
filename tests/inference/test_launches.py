"""A GPU's launches, as far as a CPU can try them: the same tokens, and nothing that waits."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor, FakeTensorMode

from dgx_music.inference.musicgen.attention import no_plans
from dgx_music.inference.musicgen.batch import Row
from dgx_music.inference.musicgen.decoder import Decoder
from dgx_music.inference.musicgen.launches import (
    STEPS_PER_LAUNCH,
    EagerLauncher,
    Plan,
    Span,
    bucket,
)
from dgx_music.inference.musicgen.slots import Slots
from dgx_music.inference.musicgen.tiny import build_tiny
from tests.inference.gpu import nobody_may_wait
from tests.inference.test_conditions import NEGATIVE, make_codes, make_negative
from tests.inference.test_slots import (
    GREEDY,
    MAX_STEPS,
    PROMPTS,
    decode,
    decoder,
    make_row,
    make_slots,
)


class BucketLauncher(EagerLauncher):
    """Runs a GPU's plans one kernel at a time, on a CPU."""

    def __init__(self, slots: Slots) -> None:
        super().__init__(slots._advance)
        self.plans: list[Plan] = []

    def fit(self, plan: Plan, slot_count: int, max_positions: int) -> Plan:
        return bucket(plan, slot_count, max_positions)

    def launch(self, plan: Plan) -> None:
        self.plans.append(plan)
        super().launch(plan)


def decode_in_buckets(rows: list[Row], slot_count: int = 4) -> list[Any]:
    slots = make_slots(slot_count, channels=rows[0].uniforms.shape[1] // 4)
    slots._launcher = BucketLauncher(slots)
    return decode(rows, slots=slots)


def make_rows(**options: Any) -> Iterator[Row]:
    """Yield rows of all kinds; the fourth has the maximum length."""
    yield make_row(PROMPTS[0], 20, seed=1, **options)
    yield make_row(PROMPTS[1], 9, seed=2, guidance_scale=1.0, **options)
    yield make_row(
        PROMPTS[2], 13, seed=3, top_k=0, top_p=0.9, negative=make_negative(NEGATIVE), **options
    )
    yield make_row(PROMPTS[3], 77, seed=4, given=make_codes(6), **options)
    yield make_row(PROMPTS[1] * 4, 5, seed=5, **options)


@pytest.mark.parametrize("options", [GREEDY, {}], ids=["greedy", "sampled"])
@pytest.mark.parametrize("slot_count", [3, 5])
def test_a_gpus_shapes_give_the_tokens_that_exact_ones_give(
    options: dict[str, Any], slot_count: int
) -> None:
    in_buckets = decode_in_buckets(list(make_rows(**options)), slot_count)
    for row, codes in zip(make_rows(**options), in_buckets, strict=True):
        assert torch.equal(codes, decode([row])[0])


def test_few_plans_serve_many_rows() -> None:
    slots = make_slots(8)
    slots._launcher = launcher = BucketLauncher(slots)
    decode([make_row(frames=frames) for frames in range(40, 77)], slots=slots)
    assert {plan.rows for plan in launcher.plans} <= {1, 2, 4, 8}
    assert len(set(launcher.plans)) <= 4
    assert len(launcher.plans) > 40


class NotingLauncher(BucketLauncher):
    """Notes what is recorded and launched, and makes no step."""

    def __init__(self, *_: Any) -> None:
        self.recorded: list[Plan] = []
        self.plans: list[Plan] = []

    def record(self, plan: Plan) -> None:
        self.recorded.append(plan)

    def launch(self, plan: Plan) -> None:
        self.plans.append(plan)


@pytest.fixture
def launcher(monkeypatch: pytest.MonkeyPatch) -> NotingLauncher:
    """The launcher of slots whose kernels find each row's lengths on the device."""
    launcher = NotingLauncher()
    monkeypatch.setattr(decoder().attention, "has_kernel", True)
    monkeypatch.setattr("dgx_music.inference.musicgen.slots.make_launcher", lambda *_: launcher)
    return launcher


def test_rows_of_all_lengths_and_texts_meet_a_plan_that_was_recorded_at_the_start(
    launcher: NotingLauncher,
) -> None:
    slots = make_slots(5)
    rows = [
        make_row(PROMPTS[0], 20),
        make_row(PROMPTS[1], 9, guidance_scale=1.0),
        make_row(PROMPTS[2], 13, top_k=0, top_p=0.9),
        make_row(PROMPTS[3] * 3, 60),
        make_row(PROMPTS[1], 70, temperature=0.0),
    ]
    for row in rows:
        slots.admit(row)
        slots.step()
    assert set(launcher.plans) <= set(launcher.recorded)
    assert [plan.rows for plan in launcher.plans] == [1, 2, 4, 4, 5]
    assert len(set(launcher.recorded)) == 4


def test_a_text_of_unusual_length_takes_recordings_of_its_own(launcher: NotingLauncher) -> None:
    slots = make_slots(2)
    long, usual = make_row(PROMPTS[1] * 3, 9), make_row(PROMPTS[1], 9)
    slots.admit(long)
    slots.step()
    slots.retire(long)
    slots.admit(usual)
    slots.step()
    assert [plan in launcher.recorded for plan in launcher.plans] == [False, True]


def test_few_sequences_on_a_gpu_take_few_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    own = decoder()
    takes = own._takes_few_kernels
    assert not takes(2)  # on a CPU
    monkeypatch.setattr(own.attention, "has_kernel", True)
    assert [takes(count) for count in (1, 16, 17)] == [True, True, False]
    with monkeypatch.context() as patch:
        patch.setattr(own.attention, "head_count", 1_536 // own.attention.head_size)
        assert [takes(count) for count in (2, 4)] == [True, False]  # as a wide layer
    monkeypatch.setattr(own, "_has_gelu", False)
    assert not takes(2)


def test_a_prefill_on_a_gpu_makes_cudnn_plan_nothing() -> None:
    """A plan for each new length would take longer than the prefill, and all rows would wait."""
    before = torch.backends.cuda.cudnn_sdp_enabled()
    seen = []

    def prefill_chunk(*_: Any) -> None:
        seen.append(torch.backends.cuda.cudnn_sdp_enabled())

    own = decoder()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(own, "_prefill_chunk", prefill_chunk)
        own.prefill(None, torch.zeros(3, own.codebook_count, dtype=torch.long), None, None)
    assert seen == [False]
    assert torch.backends.cuda.cudnn_sdp_enabled() == before


def test_two_prefills_at_once_leave_torch_as_it_was() -> None:
    before = torch.backends.cuda.cudnn_sdp_enabled()
    no_plans.__enter__()
    no_plans.__enter__()
    no_plans.__exit__()
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    no_plans.__exit__()
    assert torch.backends.cuda.cudnn_sdp_enabled() == before


def make_plan(
    rows: int, passes: int, contexts: list[int], texts: list[int], max_top_k: int
) -> Plan:
    """Return an exact plan; one text for each row, or none."""
    context_spans, text_spans = (
        tuple(Span(n, n + 1, length, False) for n, length in enumerate(lengths))
        for lengths in (contexts, texts)
    )
    return Plan(rows, passes, min(passes, len(texts)), context_spans, text_spans, max_top_k, 1)


@pytest.mark.parametrize(
    ("given", "rows", "context", "text", "max_top_k"),
    [
        (make_plan(3, 2, [100, 20, 3], [7, 7, 9], 250), 4, 128, 32, 256),
        (make_plan(5, 1, [122] * 5, [], 1), 6, 256, None, 256),
        (make_plan(6, 2, [1504] * 6, [33, 65, 2, 2, 2, 2], 2048), 6, 1504, 128, 1 << 30),
    ],
)
def test_a_plan_is_rounded_up(
    given: Plan, rows: int, context: int, text: int | None, max_top_k: int
) -> None:
    plan = bucket(given, slot_count=6, max_positions=1504)
    assert plan.context_spans == (Span(0, rows, context, is_masked=True),)
    assert plan.text_spans == (() if text is None else (Span(0, rows, text, is_masked=True),))
    assert (plan.rows, plan.max_top_k, plan.steps) == (rows, max_top_k, STEPS_PER_LAUNCH)


@pytest.fixture
def occupied() -> Slots:
    slots = make_slots(4)
    for row in list(make_rows())[:3]:
        slots.admit(row)
    return slots


def pretend(slots: Slots) -> None:
    """Replace all tensors by tensors without contents: reading a number raises an error."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    for name, value in vars(slots).items():
        if isinstance(value, Tensor):
            setattr(slots, name, mode.from_tensor(value))
        elif isinstance(value, tuple):
            setattr(slots, name, type(value)(*(mode.from_tensor(column) for column in value)))


def test_a_launch_never_waits_for_a_number(occupied: Slots) -> None:
    pretend(occupied)
    with torch.no_grad():
        occupied._advance(bucket(occupied._plan(occupied.rows), 4, decoder().max_positions))
    assert all(
        isinstance(column, FakeTensor) for column in occupied._state if isinstance(column, Tensor)
    )


def test_a_launch_that_waits_for_a_number_is_found(
    occupied: Slots, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = decoder().forward

    def wait(tokens: Tensor, *args: Any, **options: Any) -> Tensor:
        assert int(tokens.sum()) >= 0
        return forward(tokens, *args, **options)

    monkeypatch.setattr(occupied._decoder, "forward", wait)
    pretend(occupied)
    with torch.no_grad(), pytest.raises(DataDependentOutputException):
        occupied._advance(bucket(occupied._plan(occupied.rows), 4, decoder().max_positions))


# on a GPU


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def make_slots_on_gpu() -> Slots:
    model, _ = build_tiny()
    model.to("cuda")
    return Slots(Decoder(model.decoder, model.enc_to_dec_proj, MAX_STEPS + 1), 4, MAX_STEPS)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("options", [GREEDY, {}], ids=["greedy", "sampled"])
def test_graphs_give_the_tokens_of_eager_launches(options: dict[str, Any]) -> None:
    eager, graphs = make_slots_on_gpu(), make_slots_on_gpu()
    eager._launcher = BucketLauncher(eager)
    expected = decode(list(make_rows(**options)), slots=eager)
    for _ in range(3):  # eager, recorded, replayed
        for codes, others in zip(
            decode(list(make_rows(**options)), slots=graphs), expected, strict=True
        ):
            assert torch.equal(codes, others)


@pytest.mark.gpu
@needs_gpu
def test_a_launch_copies_nothing_to_the_host() -> None:
    slots = make_slots_on_gpu()
    for row in list(make_rows())[:3]:
        slots.admit(row)
    with nobody_may_wait():
        for _ in range(4):
            slots.step()
    assert slots._state.position[0] == slots.rows[0].position > 0


@pytest.mark.gpu
@needs_gpu
def test_codes_are_read_while_steps_go_on() -> None:
    slots = make_slots_on_gpu()
    row = make_row(frames=40)
    slots.admit(row)
    for _ in range(3):
        slots.step()
    with nobody_may_wait():
        reading = slots.read([(row, 0, 10)])
        slots.step()
    (codes,) = reading.codes()
    expected = decode([make_row(frames=40)], slots=make_slots_on_gpu())[0]
    assert torch.equal(codes, expected[:, :10])
    assert reading.is_there


@pytest.mark.gpu
@needs_gpu
def test_two_engines_record_at_the_same_time(caplog: pytest.LogCaptureFixture) -> None:
    expected = decode(list(make_rows()), slots=make_slots_on_gpu())
    both = [make_slots_on_gpu(), make_slots_on_gpu()]
    with ThreadPoolExecutor(2) as threads:
        found = list(threads.map(lambda slots: decode(list(make_rows()), slots=slots), both))
    assert all(torch.equal(a, b) for codes in found for a, b in zip(codes, expected, strict=True))
    assert "no CUDA graph" not in caplog.text


@pytest.mark.gpu
@needs_gpu
def test_no_clip_waits_for_a_recording() -> None:
    slots = make_slots_on_gpu()
    recorded = dict(slots._launcher._graphs)
    decode([make_row(PROMPTS[0], 77), make_row(PROMPTS[1], 20, top_k=0)], slots=slots)
    assert None not in recorded.values()
    assert slots._launcher._graphs == recorded
