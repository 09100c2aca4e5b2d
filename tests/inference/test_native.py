"""The kernels in C against torch's operations and ``generate``; skipped without a C compiler."""

from __future__ import annotations

import math
import os
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from dgx_music.inference.musicgen import native
from dgx_music.inference.musicgen.batch import Row
from dgx_music.inference.musicgen.decoder import Decoder
from dgx_music.inference.musicgen.native import Native
from dgx_music.inference.musicgen.quantised import Int8
from dgx_music.inference.musicgen.slots import Slots
from dgx_music.inference.musicgen.tiny import build_tiny, build_tiny_melody
from tests.inference.test_launches import BucketLauncher, make_rows
from tests.inference.test_musicgen import generate, load
from tests.inference.test_quantised import make_matrix
from tests.inference.test_slots import (
    GREEDY,
    MATES,
    MAX_STEPS,
    PROMPTS,
    decode,
    make_row,
    reference_codes,
)

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
TOLERANCE = {
    torch.float32: {"atol": 1e-5, "rtol": 1e-5},
    torch.bfloat16: {"atol": 0.01, "rtol": 0.02},
}


def build(size: int, dtype: torch.dtype) -> Native:
    """Return the kernels; it is an error if they compute anything else than torch does."""
    compiler = os.environ.get("CC") or shutil.which("cc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    try:
        return native._build(compiler, size, dtype)
    except (OSError, subprocess.SubprocessError) as error:
        pytest.skip(f"needs a C compiler that can build them: {error}")


def make_heads(
    count: int, size: int, positions: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries, keys and values of 3 heads, as in a step: views of larger tensors."""
    q = make_matrix(count, 3 * 3 * size).to(dtype)[:, : 3 * size].view(count, 3, 1, size)
    cache = make_matrix(count, 2, 3, positions + 7, size, seed=1).to(dtype)[..., :positions, :]
    return q, *cache.unbind(1)


@DTYPES
@pytest.mark.parametrize("size", [4, 16, 32, 64, 128])
@pytest.mark.parametrize("positions", [1, 2, 17, 300, 1600])
def test_attention_is_that_of_torch(size: int, positions: int, dtype: torch.dtype) -> None:
    q, keys, values = make_heads(5, size, positions, dtype)
    exact = functional.scaled_dot_product_attention(
        q.float(), keys.float(), values.float()
    ).flatten(1)
    read = build(size, dtype).attend(q, keys, values, None)
    assert read.dtype == dtype
    torch.testing.assert_close(read.float(), exact, **TOLERANCE[dtype])


@DTYPES
def test_masked_positions_do_not_count(dtype: torch.dtype) -> None:
    q, keys, values = make_heads(3, 16, 40, dtype)
    lengths = torch.tensor([1, 23, 40])
    mask = torch.zeros(3, 2, 40, dtype=dtype).masked_fill_(
        torch.arange(40) >= lengths[:, None, None], -math.inf
    )
    read = build(16, dtype).attend(q, keys, values, mask[:, :1, None])  # of two passes the first
    for line, length in enumerate(lengths):
        own = (part[line : line + 1, :, :length] for part in (keys, values))
        torch.testing.assert_close(
            read[line], build(16, dtype).attend(q[line : line + 1], *own, None)[0]
        )


@DTYPES
def test_scores_far_apart_and_far_from_zero_do_not_overflow(dtype: torch.dtype) -> None:
    q, keys, values = make_heads(2, 16, 50, dtype)
    exact = functional.scaled_dot_product_attention(
        200 * q.float(), keys.float(), values.float()
    ).flatten(1)
    torch.testing.assert_close(
        build(16, dtype).attend(200 * q, keys, values, None).float(), exact, atol=0.02, rtol=0.02
    )


@DTYPES
@pytest.mark.parametrize("place", ["keys", "values"])
@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_nan_and_infinity_stay_in_their_sequence(
    place: str, wrong: float, dtype: torch.dtype
) -> None:
    q, keys, values = make_heads(3, 16, 20, dtype)
    kernels = build(16, dtype)
    right = kernels.attend(q, keys, values, None)
    {"keys": keys, "values": values}[place][1, :, 6, :] = wrong
    read = kernels.attend(q, keys, values, None)
    assert not read[1].isfinite().any()
    assert torch.equal(read[::2], right[::2])


def test_keys_with_other_strides_than_a_cache_are_refused() -> None:
    q, keys, values = make_heads(2, 16, 20, torch.float32)
    kernels = build(16, torch.float32)
    for wrong in (
        (keys.contiguous(), values),
        (keys.mT.contiguous().mT, values.mT.contiguous().mT),
    ):
        with pytest.raises(ValueError, match="strides"):
            kernels.attend(q, *wrong, None)


def test_several_threads_may_call_at_once() -> None:
    kernels, heads = build(32, torch.float32), make_heads(8, 32, 300, torch.float32)
    expected = kernels.attend(*heads, None)
    with ThreadPoolExecutor(4) as pool:
        assert all(
            torch.equal(read, expected)
            for read in pool.map(lambda _: kernels.attend(*heads, None), range(40))
        )


@DTYPES
@pytest.mark.parametrize("threads", [1, 2])
def test_a_sequence_reads_the_same_alone_and_with_others(threads: int, dtype: torch.dtype) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        q, keys, values = make_heads(7, 32, 61, dtype)
        kernels = build(32, dtype)
        together = kernels.attend(q, keys, values, None)
        for line in range(7):
            alone = kernels.attend(*(part[line : line + 1] for part in (q, keys, values)), None)
            assert torch.equal(alone[0], together[line])
    finally:
        torch.set_num_threads(before)


@DTYPES
def test_rows_are_rounded_to_multiples_of_their_scale(dtype: torch.dtype) -> None:
    x = (make_matrix(50, 70) * torch.logspace(-20, 20, 50)[:, None]).to(dtype)
    rounded, scales = build(16, dtype).quantise_rows(x)
    assert rounded.dtype == torch.int8
    assert scales.dtype == dtype
    assert (rounded.abs().amax(1) >= 125).all()
    error = (rounded * scales.float() - x.float()).abs()
    assert (error <= 0.51 * scales.float()).all()


@DTYPES
def test_zeros_nan_and_infinity_stay_what_they_are_in_a_product(
    dtype: torch.dtype,
) -> None:
    x = make_matrix(6, 64).to(dtype)
    x[0], x[1, 3], x[2, 3] = 0, math.nan, math.inf
    x[3] *= 1e-38
    x[4] *= 1e-36
    product = Int8.of(make_matrix(96, 64, seed=1), build(16, dtype)).apply(x)
    assert product[0].eq(0).all()
    assert not product[1:3].isfinite().any()
    assert (product[3:5].abs() < 1e-34).all()
    assert product[5].isfinite().all()


@DTYPES
def test_products_are_near_those_with_torchs_rounding(dtype: torch.dtype) -> None:
    x, weight = make_matrix(5, 64).to(dtype), make_matrix(96, 64, seed=1)
    plain, kernels = (
        Int8.of(weight).apply(x).float(),
        Int8.of(weight, build(16, dtype)).apply(x).float(),
    )
    assert (plain - kernels).abs().max() < 0.02 * plain.abs().max()


# in the slots


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each kernel is called."""
    counted: Counter[str] = Counter()

    def count(kernel: str) -> None:
        right = getattr(Native, kernel)

        def call(self: Native, *numbers: Any) -> Any:
            counted[kernel] += 1
            return right(self, *numbers)

        monkeypatch.setattr(Native, kernel, call)

    count("attend")
    count("quantise_rows")
    return counted


@pytest.mark.parametrize("bits", ["full", "int8"])
def test_they_do_all_attention_and_all_rounding_of_a_step(bits: str, calls: Counter[str]) -> None:
    decoder = make_decoder()
    if bits == "int8":
        decoder.quantise()
    slots = Slots(decoder, 2, MAX_STEPS)
    slots.admit(make_row())
    calls.clear()
    slots.step()
    layers = len(decoder.layers)
    assert calls["attend"] == 2 * layers  # self-attention and cross-attention
    assert calls["quantise_rows"] == (6 * layers + 1 if bits == "int8" else 0)


def make_decoder(dtype: torch.dtype = torch.float32, channels: int = 1) -> Decoder:
    model = build_tiny(channels)[0].to(dtype)
    decoder = Decoder(model.decoder, model.enc_to_dec_proj, MAX_STEPS + 1)
    build(decoder.attention.head_size, dtype)
    decoder.build_kernels()
    return decoder


@pytest.mark.parametrize("channels", [1, 2])
def test_greedy_tokens_are_those_of_generate(channels: int) -> None:
    lengths = (40, 5, 9, 23)
    rows = [
        make_row(prompt, frames, channels, guidance_scale=1.0 if frames == 9 else 3.0, **GREEDY)
        for prompt, frames in zip(PROMPTS, lengths, strict=True)
    ]
    codes = decode(rows, slots=Slots(make_decoder(channels=channels), 2, MAX_STEPS))
    for prompt, row, own in zip(PROMPTS, rows, codes, strict=True):
        assert torch.equal(
            own, reference_codes(prompt, row.frame_count, row.sampling.guidance_scale, channels)
        )


@DTYPES
@pytest.mark.parametrize("bits", ["full", "int8"])
def test_a_seeded_row_is_the_same_alone_and_in_any_batch(bits: str, dtype: torch.dtype) -> None:
    decoder = make_decoder(dtype)
    if bits == "int8":
        decoder.quantise()

    def make(**fields: Any) -> Row:
        row = make_row(**fields)
        assert row.text is not None
        row.text = row.text.to(dtype)
        return row

    own = {"frames": 16, "seed": 7}
    (alone,) = decode([make(**own)], slots=Slots(decoder, 4, MAX_STEPS))
    for place in (0, 3):
        rows = [make(**fields) for fields in MATES]
        rows.insert(place, make(**own))
        assert torch.equal(decode(rows, slots=Slots(decoder, 4, MAX_STEPS))[place], alone)


def test_rows_of_all_kinds_have_the_same_tokens_without_them() -> None:
    for row, plain in zip(make_rows(**GREEDY), make_rows(**GREEDY), strict=True):
        (codes,) = decode([row], slots=Slots(make_decoder(), 2, MAX_STEPS))
        assert torch.equal(codes, decode([plain])[0])


def test_a_gpus_plans_are_read_as_well() -> None:
    slots = Slots(make_decoder(), 3, MAX_STEPS)
    slots._launcher = BucketLauncher(slots)
    for plain, codes in zip(
        make_rows(**GREEDY), decode(list(make_rows(**GREEDY)), slots=slots), strict=True
    ):
        assert torch.equal(codes, decode([plain])[0])


def test_a_melody_is_read_as_well(tmp_path: Path, calls: Counter[str]) -> None:
    for part in build_tiny_melody():
        part.save_pretrained(tmp_path)
    build(32, torch.float32)
    with_kernels, without = (
        generate(load(tmp_path, kernels=choice), model=str(tmp_path), temperature=0.0)
        for choice in ("auto", "off")
    )
    assert calls["attend"] > 0
    assert [audio.facts["kernels"] for audio in (with_kernels, without)] == ["c", "torch"]
    assert (with_kernels.samples == without.samples).all()


def test_a_cache_in_8_bits_is_read_as_well() -> None:
    plain, decoder = build_tiny()[0], make_decoder()
    expected = Decoder(plain.decoder, plain.enc_to_dec_proj, MAX_STEPS + 1)
    for each in (expected, decoder):
        each.shrink_cache()
    codes = [
        decode([make_row(frames=6, **GREEDY)], slots=Slots(each, 1, MAX_STEPS))[0]
        for each in (expected, decoder)
    ]
    assert torch.equal(*codes)


def test_the_engine_builds_them_unless_settings_forbid_it() -> None:
    build(32, torch.float32)
    engine = load(kernels="auto")
    assert isinstance(engine._decoder.attention.native, Native)
    assert (generate(engine).samples != 0).any()
    assert load(kernels="off")._decoder.attention.native is None


# if they cannot be built


@pytest.mark.parametrize("compiler", ["no-such-compiler", "false"])
def test_without_a_compiler_torch_does_the_work(
    compiler: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CC", compiler)
    assert native.build(16, torch.float32) is None
    assert "torch's slower operations instead" in caplog.text
    assert len(generate(load()).samples[0]) == 0.2 * 32_000


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        (
            "import sys; print('native.c:1: wrong', 'more', sep='\\n', file=sys.stderr); sys.exit(1)",
            "native.c:1: wrong",
        ),
        ("import sys; open(sys.argv[sys.argv.index('-o') + 1], 'w').write('x')", "OSError"),
        (
            "import sys; print('In file', 'x.c:1: error: no', sep='\\n', file=sys.stderr); sys.exit(1)",
            "x.c:1: error: no",
        ),
        ("import sys; print(' ', file=sys.stderr); sys.exit(3)", "ended with 3"),
        ("import time; time.sleep(9)", "timed out"),
    ],
)
def test_the_reason_is_logged_in_one_line(
    program: str, reason: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(native, "_BUILD_SECONDS", 0.5)
    monkeypatch.setenv("CC", shlex.join([sys.executable, "-c", program]))
    assert native.build(16, torch.float32) is None
    assert reason in caplog.text
    assert caplog.text.count("\n") == 1


def test_threads_that_are_not_torchs_are_refused(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    build(16, torch.float32)
    native._build.cache_clear()
    seen = iter(
        [{"/torch/lib/libgomp.so.1"}, *[{"/torch/lib/libgomp.so.1", "/usr/lib/libomp.so.5"}] * 2]
    )
    monkeypatch.setattr(
        native, "_first_openmp_runtimes", cache(native._first_openmp_runtimes.__wrapped__)
    )
    monkeypatch.setattr(native, "_openmp_runtimes", lambda: next(seen))
    # And again, while the library is still loaded.
    assert native.build(16, torch.float32) is None
    assert native.build(16, torch.float32) is None
    assert "their threads are not torch's, but those of /usr/lib/libomp.so.5" in caplog.text


def test_torchs_own_threads_are_seen() -> None:
    build(16, torch.float32)
    assert len(native._openmp_runtimes()) == 1


def test_a_machine_without_a_compiler_logs_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", "")
    assert native.build(16, torch.float32) is None
    assert caplog.text == ""
    assert generate(load()).facts["kernels"] == "torch"


@pytest.mark.parametrize(
    ("size", "dtype"), [(24, torch.float32), (2, torch.float32), (16, torch.float16)]
)
def test_other_sizes_and_formats_are_left_to_torch(
    size: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CC", "not-called")
    assert native.build(size, dtype) is None
    assert f"heads of {size}" in caplog.text


@DTYPES
@pytest.mark.parametrize("kernel", ["attend", "quantise_rows"])
def test_kernels_that_compute_something_else_are_not_used(
    kernel: str,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    build(16, dtype)
    native._build.cache_clear()
    right = getattr(Native, kernel)

    def wrong(self: Native, *numbers: Any) -> Any:
        result = right(self, *numbers)
        return result * 1.5 if isinstance(result, Tensor) else (result[0] + 2, result[1])

    monkeypatch.setattr(Native, kernel, wrong)
    assert native.build(16, dtype) is None
    assert "they do not compute what torch does" in caplog.text


def test_a_bold_compiler_changes_no_other_arithmetic(monkeypatch: pytest.MonkeyPatch) -> None:
    """With gcc before 13, a library made with -ffast-math flushes torch's small numbers to 0."""
    build(16, torch.float32)
    monkeypatch.setenv("CC", f"{os.environ.get('CC', 'cc')} -ffast-math")
    native.build(16, torch.float32)
    assert (torch.tensor([1e-40]) * 1).item() > 0
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(lambda: (torch.tensor([1e-40]) * 1).item()).result() > 0
