"""The codec in windows against transformers' whole pass, and the thread that does the windows."""

from __future__ import annotations

import gc
import random
import threading
import weakref
from collections.abc import Hashable, Iterator, Sequence
from concurrent.futures import CancelledError
from functools import cache
from itertools import pairwise
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import EncodecConfig, EncodecModel

from benchmarks.musicgen_models import build_codec
from dgx_music.errors import EngineUnavailableError
from dgx_music.inference.musicgen.codec import Codec, CodecWork
from dgx_music.inference.musicgen.codec_thread import CodecThread
from dgx_music.inference.musicgen.devices import keep_float32
from dgx_music.inference.musicgen.live_clip import LiveClip
from dgx_music.inference.musicgen.streaming import Chain, State, join, phase, split
from dgx_music.inference.musicgen.tiny import build_tiny
from tests.inference.factories import QuietRun
from tests.inference.gpu import needs_gpu
from tests.patience import PATIENCE

TOLERANCE = 1e-4
FRAME = 640
OF_MUSICGEN = {"use_causal_conv": False, "use_conv_shortcut": False}
SHAPES: dict[str, dict[str, Any]] = {
    "musicgen": OF_MUSICGEN | {"upsampling_ratios": [8, 5, 4, 4]},
    "one LSTM layer": OF_MUSICGEN | {"num_lstm_layers": 1},
    "two residual layers": OF_MUSICGEN | {"num_residual_layers": 2},
    "dilated": OF_MUSICGEN | {"num_residual_layers": 3, "dilation_growth_rate": 3},
    "even kernels": OF_MUSICGEN | {"kernel_size": 4, "residual_kernel_size": 2},
    "kernels of one": OF_MUSICGEN | {"kernel_size": 1, "residual_kernel_size": 1},
    "odd strides": OF_MUSICGEN | {"upsampling_ratios": [5, 3]},
    "shortcuts": {"use_causal_conv": False, "use_conv_shortcut": True},
    "causal": {"use_causal_conv": True},
    "causal, trimmed on both sides": {"use_causal_conv": True, "trim_right_ratio": 0.4},
}


@cache
def make_model(shape: str) -> EncodecModel:
    """Return a toy with random weights and biases."""
    config = {"upsampling_ratios": [4, 3], "num_filters": 4, "hidden_size": 8, "codebook_size": 64}
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(7)
        model = EncodecModel(EncodecConfig(**config | SHAPES[shape])).eval()
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.normal_(0, 0.3)
    return model


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def cuts_of(length: int) -> Iterator[list[int]]:
    """Yield where windows begin: nowhere, at the end, everywhere, and at many random places, some twice."""
    choice = random.Random(length)
    yield []
    yield [length]
    yield list(range(length))
    for count in (1, 1, 2, 3, 8):
        yield sorted(choice.randint(0, length) for _ in range(count))


def in_windows(layers: Any, x: Tensor, cuts: Sequence[int]) -> Tensor:
    chain, places = Chain(layers), [0, *cuts, x.shape[-1]]
    parts: list[Tensor] = []
    state: State = None
    for start, end in pairwise(places):
        is_last = len(parts) == len(cuts)
        part, state = chain.step(x[..., start:end], state, is_last=is_last)
        parts.append(part)
    return torch.cat(parts, dim=-1)


def assert_near(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= TOLERANCE * max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize("frames", [1, 2, 5, 31])
@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_decoding_in_windows_makes_what_the_whole_pass_makes(shape: str, frames: int) -> None:
    decoder, x = make_model(shape).decoder, noise(2, 8, frames)
    expected = decoder(x)
    for cuts in cuts_of(frames):
        assert_near(in_windows(decoder.layers, x, cuts), expected)


@pytest.mark.parametrize("samples", [1, 9, 64, 233])
@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_encoding_in_windows_makes_what_the_whole_pass_makes(shape: str, samples: int) -> None:
    encoder, x = make_model(shape).encoder, noise(2, 1, samples)
    expected = encoder(x)
    for cuts in cuts_of(samples):
        assert_near(in_windows(encoder.layers, x, cuts), expected)


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_clips_go_together_when_they_are_in_the_same_phase(shape: str) -> None:
    """One is two windows ahead when they meet; both make what they make alone."""
    layers, x = make_model(shape).decoder.layers, noise(2, 8, 130)
    chain, ends = Chain(layers), (130, 90)
    states: list[State] = [None, None]
    made: list[list[Tensor]] = [[], []]
    places = [0, 0]

    def go_on(*clips: int) -> None:
        is_last = places[clips[0]] + 30 > ends[clips[0]]
        width = 10 if is_last else 20
        parts = [x[clip : clip + 1, :, places[clip] : places[clip] + width] for clip in clips]
        assert len({phase(states[clip]) for clip in clips}) == 1
        together = join([states[clip] for clip in clips])
        out, after = chain.step(torch.cat(parts), together, is_last=is_last)
        for clip, part, state in zip(clips, out.split(1), split(after, len(clips)), strict=True):
            made[clip].append(part)
            states[clip], places[clip] = state, places[clip] + width

    for clips in ((0,), (0,), (0,), (1,), (0, 1), (1, 0), (0, 1), (1, 0)):
        go_on(*clips)
    assert places == list(ends)
    for clip, end in enumerate(ends):
        alone = in_windows(layers, x[clip : clip + 1, :, :end], list(range(20, end, 20)))
        assert_near(torch.cat(made[clip], dim=-1), alone)


@torch.no_grad()
def test_random_codecs_at_random_boundaries_make_what_the_whole_pass_makes() -> None:
    choice = random.Random(20)
    for _ in range(10):
        shape = {
            "upsampling_ratios": [choice.randint(2, 5) for _ in range(choice.randint(1, 2))],
            "use_causal_conv": choice.random() < 0.3,
            "use_conv_shortcut": choice.random() < 0.5,
            "num_residual_layers": choice.randint(1, 3),
            "dilation_growth_rate": choice.randint(1, 3),
            "kernel_size": choice.randint(1, 9),
            "residual_kernel_size": choice.randint(1, 5),
            "last_kernel_size": choice.randint(1, 9),
        }
        model = EncodecModel(EncodecConfig(num_filters=2, hidden_size=4, **shape)).eval()
        for part, x in (
            (model.decoder, noise(1, 4, choice.randint(1, 40))),
            (model.encoder, noise(1, 1, choice.randint(1, 200))),
        ):
            for cuts in cuts_of(x.shape[-1]):
                assert_near(in_windows(part.layers, x, cuts), part(x))


# a clip through the codec


@pytest.fixture(scope="module", params=[1, 2])
def channels(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@cache
def make_codec(channels: int) -> Codec:
    return Codec(build_tiny(channels)[0].audio_encoder, channels)


def random_codes(channels: int, frames: int, seed: int = 0) -> Tensor:
    random = torch.Generator().manual_seed(frames + seed)
    return torch.randint(2_048, (4 * channels, frames), generator=random)


@torch.no_grad()
def whole(channels: int, codes: Tensor) -> Tensor:
    model = build_tiny(channels)[0].audio_encoder
    sides = [codes[None, None, side::channels] for side in range(channels)]
    return torch.cat([model.decode(side, [None]).audio_values[0] for side in sides])


@pytest.mark.parametrize("frames", [1, 49, 50, 51, 100, 173])
def test_a_clip_has_the_samples_of_the_whole_pass(channels: int, frames: int) -> None:
    codes = random_codes(channels, frames)
    samples = make_codec(channels).decode(codes).finish()
    assert samples.shape == (channels, frames * FRAME)
    assert_near(samples, whole(channels, codes))


def test_a_clip_of_one_window_has_exactly_the_samples_of_the_whole_pass(channels: int) -> None:
    codes = random_codes(channels, 30)
    assert torch.equal(make_codec(channels).decode(codes).finish(), whole(channels, codes))


@pytest.mark.parametrize("length", [1, 32_000, 32_001, 81_234])
@torch.no_grad()
def test_a_given_clip_has_the_codes_of_the_whole_pass(channels: int, length: int) -> None:
    samples = 0.1 * noise(channels, length)
    codes = make_codec(channels).encode(samples).finish()
    sides = build_tiny(channels)[0].audio_encoder.encode(samples[:, None]).audio_codes[0]
    assert torch.equal(codes, sides.transpose(0, 1).flatten(0, 1))


def test_samples_are_there_a_moment_after_their_frames(channels: int) -> None:
    codes = random_codes(channels, 110)
    work = make_codec(channels).decode(codes)
    (first,), (second,), (rest,) = work.step(), work.step(), work.step()
    assert 46 * FRAME < first.shape[1] < 50 * FRAME
    assert second.shape[1] == 50 * FRAME
    assert_near(torch.cat([first, second, rest], dim=1), whole(channels, codes))


def test_two_clips_at_a_time_do_not_mix(channels: int) -> None:
    clips = [random_codes(channels, 120), random_codes(channels, 130)]
    works = [make_codec(channels).decode(codes) for codes in clips]
    while any(work.left for work in works):
        for work in works:
            work.take(*work.step())
    for work, codes in zip(works, clips, strict=True):
        assert_near(work.finish(), whole(channels, codes))


@pytest.mark.parametrize("is_on_gpu", [False, True])
def test_clips_that_go_together_make_what_they_make_alone(
    channels: int, is_on_gpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    codec = make_codec(channels)
    if is_on_gpu:  # there, all channels of all clips are one batch
        monkeypatch.setattr(codec._decoding, "_sides_at_once", None)
        monkeypatch.setattr(codec._encoding, "_sides_at_once", None)
    codes = [random_codes(channels, 120, seed) for seed in (1, 2, 3)]
    samples = [whole(channels, each) for each in codes]
    decoded = together([codec.decode(each) for each in codes])
    for ours, expected in zip(decoded, samples, strict=True):
        assert_near(ours, expected)
    alone = [codec.encode(each).finish() for each in samples]
    encoded = together([codec.encode(each) for each in samples])
    for ours, expected in zip(encoded, alone, strict=True):
        assert (ours == expected).float().mean() > 0.99  # a tie may fall the other way


def together(works: list[CodecWork]) -> list[Tensor]:
    first, *others = works
    while first.left:
        assert len({work.phase for work in works}) == 1
        for work, part in zip(works, first.step(*others), strict=True):
            work.take(part)
    return [work.finish() for work in works]


def test_a_step_that_fails_changes_nothing(channels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    codec, codes = make_codec(channels), random_codes(channels, 120)
    work = codec.decode(codes)
    work.take(*work.step())
    with monkeypatch.context() as patch:
        patch.setattr(codec._decoding, "_gather", Mock(side_effect=RuntimeError("no memory")))
        with pytest.raises(RuntimeError, match="no memory"):
            work.step()
    assert_near(work.finish(), whole(channels, codes))


class _Largest(TorchDispatchMode):
    """Notes the size of the largest tensor that torch makes."""

    def __init__(self) -> None:
        super().__init__()
        self.nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **kwargs or {})
        for each in result if isinstance(result, tuple | list) else [result]:
            if isinstance(each, Tensor):
                self.nbytes = max(self.nbytes, each.nbytes)
        return result


def largest(work: CodecWork) -> int:
    """Return the bytes of the largest tensor on the work's way, its result aside."""
    with _Largest() as mode:
        work.finish()
    return mode.nbytes


def test_a_long_clip_takes_no_larger_tensors_than_a_short_one() -> None:
    codec = make_codec(1)
    decoded = [largest(codec.decode(random_codes(1, frames))) for frames in (150, 3_000)]
    encoded = [largest(codec.encode(noise(1, frames * FRAME))) for frames in (150, 1_500)]
    for short, long in (decoded, encoded):
        assert long <= short


@pytest.mark.parametrize(
    "other",
    [
        {"normalize": True},
        {"norm_type": "time_group_norm"},
        {"chunk_length_s": 1.0},
        {"pad_mode": "replicate"},
    ],
)
def test_a_codec_that_must_see_the_whole_clip_is_refused(other: dict[str, Any]) -> None:
    model = EncodecModel(EncodecConfig(num_filters=2, hidden_size=4, **other))
    with pytest.raises(EngineUnavailableError, match="use a model with MusicGen's own codec"):
        Codec(model, 1)


# the thread


class FakeWork(CodecWork):
    """So many windows, which note their names in the order in which they are done."""

    def __init__(self, name: str, windows: int, done: list[str]) -> None:
        self.name, self.left, self._done = name, windows, done

    @property
    def is_ready(self) -> bool:
        return self.left > 0

    @property
    def phase(self) -> Hashable:
        return self.left

    def step(self, *others: CodecWork) -> list[Any]:
        for work in (self, *others):
            work.left -= 1
        self._done.append(
            "+".join(work.name for work in (self, *others) if isinstance(work, FakeWork))
        )
        return [None] * (1 + len(others))

    def take(self, made: Any) -> None: ...

    def finish(self) -> Tensor:
        return torch.zeros(1)


class HeldWork(FakeWork):
    """A window that takes until it is released."""

    def __init__(self) -> None:
        super().__init__("held", 1, [])
        self.release = threading.Event()

    def step(self, *others: CodecWork) -> list[Any]:
        assert self.release.wait(PATIENCE)
        return super().step(*others)


@pytest.fixture
def codec_thread() -> Iterator[CodecThread]:
    thread = CodecThread()
    yield thread
    thread.close()


def do_together(thread: CodecThread, works: Sequence[CodecWork]) -> None:
    """Submit all before the first begins, and wait until all are done."""
    held = HeldWork()
    results = [thread.start(work) for work in (held, *works)]
    held.release.set()
    for result in results:
        result.result(PATIENCE)


def test_a_short_clip_does_not_wait_for_a_long_one(codec_thread: CodecThread) -> None:
    done: list[str] = []
    do_together(codec_thread, [FakeWork("long", 3, done), FakeWork("short", 2, done)])
    assert done == ["short", "short", "long", "long", "long"]


def test_equal_clips_are_done_one_after_another(codec_thread: CodecThread) -> None:
    done: list[str] = []
    do_together(codec_thread, [FakeWork(name, 2, done) for name in ("a", "b", "c")])
    assert done == ["a", "a", "b", "b", "c", "c"]


def test_a_long_clip_waits_for_no_more_than_its_own_length_while_short_ones_keep_coming(
    codec_thread: CodecThread,
) -> None:
    done: list[str] = []

    class FollowedByAnother(FakeWork):
        def step(self, *others: CodecWork) -> list[Any]:
            if len(done) < 30:
                codec_thread.start(FollowedByAnother("short", 1, done))
            return super().step(*others)

    do_together(codec_thread, [FakeWork("long", 6, done), FollowedByAnother("short", 1, done)])
    assert done[:11] == ["short"] * 5 + ["long"] * 6


@pytest.fixture
def joint_thread() -> Iterator[CodecThread]:
    """A thread as for a GPU, but of at most two clips at a time."""
    thread = CodecThread(2)
    yield thread
    thread.close()


def test_a_clip_is_not_credited_for_turns_in_which_it_had_no_window(
    codec_thread: CodecThread,
) -> None:
    done: list[str] = []

    class Late(FakeWork):
        def push(self, part: Tensor) -> None: ...

    early = codec_thread.open(Late("early, long", 9, done))
    for number in range(9):
        codec_thread.start(FakeWork(f"before {number}", 1, [])).result(PATIENCE)
    held = HeldWork()
    codec_thread.start(held)
    codec_thread.push(early, torch.zeros(1))
    short = codec_thread.start(FakeWork("short", 1, done))
    held.release.set()
    short.result(PATIENCE)
    early.result.result(PATIENCE)
    assert done == ["short", *["early, long"] * 9]


def test_a_failed_step_holds_no_memory_while_each_clip_is_tried_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    codec, thread = make_codec(1), CodecThread(8)
    gather = codec._decoding._gather
    joint: list[weakref.ref[Tensor]] = []
    are_alive: list[bool] = []

    def broken(x: Tensor) -> Tensor:
        are_alive.extend(each() is not None for each in joint)
        if len(x) > 1:
            joint.append(weakref.ref(x))
            raise torch.OutOfMemoryError("CUDA out of memory")
        return gather(x)

    monkeypatch.setattr(codec._decoding, "_gather", broken)
    monkeypatch.setattr(codec._decoding, "_sides_at_once", None)
    held = HeldWork()
    thread.start(held)
    results = [thread.start(codec.decode(random_codes(1, 50, seed))) for seed in range(3)]
    held.release.set()
    for seed, result in enumerate(results):
        assert_near(result.result(PATIENCE), whole(1, random_codes(1, 50, seed)))
    thread.close()
    assert are_alive == [False] * 3


def test_a_failed_clip_is_freed_at_once(codec_thread: CodecThread) -> None:
    """Not by the garbage collector: on a GPU its memory is wanted soon."""
    work = FakeWork("broken", 1, [])
    work.step = Mock(side_effect=RuntimeError("no window"))  # type: ignore[method-assign]
    there = weakref.ref(work)
    gc.collect()
    gc.disable()
    try:
        result = codec_thread.start(work)
        assert result.exception(PATIENCE) is not None
        codec_thread.start(FakeWork("next", 1, [])).result(PATIENCE)
        del work, result
        assert there() is None
    finally:
        gc.enable()


@pytest.mark.parametrize(("kind", "most"), [("cpu", 1), ("cuda", 8)])
def test_only_a_gpu_does_windows_together(
    kind: str, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    codec = make_codec(1)
    monkeypatch.setattr(codec, "_model", SimpleNamespace(device=torch.device(kind)))
    assert codec.most_together == most


def test_clips_in_the_same_phase_go_together(joint_thread: CodecThread) -> None:
    done: list[str] = []
    works = [FakeWork("long", 3, done), *(FakeWork(name, 2, done) for name in ("a", "b", "c"))]
    do_together(joint_thread, works)
    assert done == ["a+b", "a+b", "c", "c", "long", "long", "long"]


@pytest.mark.parametrize("failing", ["step", "take"])
def test_of_clips_that_go_together_only_the_broken_one_fails(
    joint_thread: CodecThread, failing: str
) -> None:
    class Broken(FakeWork):
        def step(self, *others: CodecWork) -> list[Any]:
            if failing == "step":
                raise RuntimeError("no window")
            return super().step(*others)

        def take(self, made: Any) -> None:
            raise RuntimeError("no window")

    held = HeldWork()
    joint_thread.start(held)
    broken = joint_thread.start(Broken("broken", 2, []))
    done: list[str] = []
    other = joint_thread.start(FakeWork("other", 2, done))
    held.release.set()
    other.result(PATIENCE)
    assert isinstance(broken.exception(PATIENCE), RuntimeError)
    assert done.count("other") == 2 - (failing == "take")


def test_a_short_clip_goes_between_the_windows_of_a_long_one(codec_thread: CodecThread) -> None:
    done: list[str] = []

    class Interrupted(FakeWork):
        def step(self, *others: CodecWork) -> list[Any]:
            made = super().step(*others)
            if self.left == 2:
                results.append(codec_thread.start(FakeWork("short", 1, done)))
            return made

    results: list[Any] = []
    codec_thread.start(Interrupted("long", 3, done)).result(PATIENCE)
    results[0].result(PATIENCE)
    assert done == ["long", "short", "long", "long"]


def test_a_cancelled_clip_is_done_no_further(codec_thread: CodecThread) -> None:
    done: list[str] = []

    class Cancelled(FakeWork):
        def step(self, *others: CodecWork) -> list[Any]:
            results[0].cancel()
            return super().step(*others)

    results: list[Any] = []
    held = HeldWork()
    codec_thread.start(held)
    results.append(codec_thread.start(Cancelled("cancelled", 9, done)))
    other = codec_thread.start(FakeWork("other", 10, done))
    held.release.set()
    other.result(PATIENCE)
    with pytest.raises(CancelledError):
        results[0].result()
    assert done == ["cancelled", *["other"] * 10]


@pytest.mark.parametrize("failing", ["step", "finish"])
def test_a_failure_is_that_of_one_clip(
    codec_thread: CodecThread, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    broken = FakeWork("broken", 2, [])
    monkeypatch.setattr(broken, failing, Mock(side_effect=RuntimeError("no window")))
    failed = codec_thread.start(broken)
    with pytest.raises(RuntimeError, match="no window"):
        failed.result(PATIENCE)
    codec_thread.start(FakeWork("next", 1, [])).result(PATIENCE)


def test_no_more_steps_are_made_for_a_clip_whose_codec_has_failed(
    codec_thread: CodecThread,
) -> None:
    broken = Mock(left=3, is_ready=True, step=Mock(side_effect=RuntimeError("no window")))
    codec: Any = SimpleNamespace(sample_rate=1, window=1, begin_decoding=lambda *_: broken)
    clip = LiveClip(codec, codec_thread, frame_count=3, sample_count=3, run=QuietRun())
    clip.push(torch.zeros(1, 1))
    assert clip.result.exception(PATIENCE) is not None
    with pytest.raises(RuntimeError, match="no window"):
        clip.push(torch.zeros(1, 1))


def test_a_clip_for_which_no_thread_can_be_started_is_not_done_later(
    monkeypatch: pytest.MonkeyPatch, codec_thread: CodecThread
) -> None:
    done: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", Mock(side_effect=RuntimeError("no thread")))
        with pytest.raises(RuntimeError, match="no thread"):
            codec_thread.start(FakeWork("lost", 1, done))
    codec_thread.start(FakeWork("next", 1, done)).result(PATIENCE)
    assert done == ["next"]


@pytest.mark.gpu
@needs_gpu
def test_on_a_gpu_samples_depend_neither_on_windows_nor_on_other_clips(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In TF32 they would, by a thousandth of the peak; a toy is too small to show it."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", torch.backends.cudnn.allow_tf32)
    keep_float32()
    with torch.no_grad():
        models = []
        for _ in range(2):
            torch.manual_seed(7)
            models.append(build_codec("small", torch.device("cpu")).to("cuda"))
        codec = Codec(models[0], 1)
        clips = [torch.randint(0, 2048, (4, 210)) for _ in range(8)]
        whole = models[1].decode(clips[0][None, None].cuda(), [None]).audio_values[0].cpu()
        alone = codec.decode(clips[0]).finish()
        together = [codec.decode(clip) for clip in clips]
        while together[0].left:
            for work, made in zip(together, together[0].step(*together[1:]), strict=True):
                work.take(made)
        beside = together[0].finish()
    for samples in (alone, beside):
        assert (samples - whole).abs().max() < 1e-4 * whole.abs().max()
