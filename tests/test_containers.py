"""Files of every container with headers that lie or say nothing: all of the audio, or a refusal."""

from __future__ import annotations

import io
import itertools
import re
import struct
from contextlib import suppress

import numpy as np
import pytest
import soundfile

from dgx_music.audio import clips
from dgx_music.audio.clips import Reader
from dgx_music.catalog import MODELS
from dgx_music.errors import InvalidRequestError

SECONDS, RATE = 4, 44_100
TOLERANCE = 0.06
"""Seconds: two frames of MP3, which an encoder adds and which stay if there is no tag."""


def sound(seconds: float = SECONDS, rate: int = RATE, channels: int = 1):
    """Return noise: every sample of it counts, and a variable bit rate varies."""
    level = np.linspace(0.05, 0.5, round(seconds * rate))[:, None]
    return level * np.random.default_rng(5).uniform(-1, 1, (len(level), channels))


def encoded(
    kind: str, subtype: str | None = None, samples=None, rate: int = RATE, **options
) -> bytes:
    samples, buffer = sound(rate=rate) if samples is None else samples, io.BytesIO()
    with soundfile.SoundFile(
        buffer, "w", rate, samples.shape[1], format=kind, subtype=subtype, **options
    ) as file:
        file.write(samples)
    return buffer.getvalue()


def read(data: bytes, name: str = "continuation"):
    """Return the seconds of the clip and its samples."""
    model = MODELS["musicgen-melody" if name == "melody" else "musicgen-small"]
    clip = Reader().read({name: data}, model, 60)[name]
    return clip.duration_seconds, clips.load(name, clip.data, clip.sha256).samples


def whole(data: bytes, seconds: float = SECONDS) -> bool:
    """Return whether the file is read to its end, in either role."""
    return all(
        read(data, name)[0] == pytest.approx(seconds, abs=TOLERANCE)
        for name in ("continuation", "melody")
    )


def refusal(data: bytes) -> str:
    with pytest.raises(InvalidRequestError) as caught:
        read(data)
    return str(caught.value)


def put(data: bytes, start: int, form: str, *values: int) -> bytes:
    return data[:start] + struct.pack(form, *values) + data[start + struct.calcsize(form) :]


# WAV

WAV = encoded("WAV", "PCM_16")
DATA = WAV.index(b"data") + 4
SAMPLES = len(WAV) - DATA - 4


@pytest.mark.parametrize(
    "subtype",
    ["PCM_U8", "PCM_16", "PCM_24", "FLOAT", "DOUBLE", "ULAW", "IMA_ADPCM", "MS_ADPCM", "GSM610"],
)
@pytest.mark.parametrize("size", [0, 1_000, 0xFFFF_FFFF, 0x7FFF_F000, 0x8000_0000, 50_000_000])
def test_a_wav_is_read_to_its_end_whatever_its_header_says(subtype: str, size: int) -> None:
    data = encoded("WAV", subtype)
    seconds = soundfile.info(io.BytesIO(data)).duration  # more than went in: ADPCM has blocks

    assert whole(put(data, data.index(b"data") + 4, "<I", size), seconds)


@pytest.mark.parametrize("size", [0, 1_000, 2**64 - 1])
def test_an_rf64_is_read_to_its_end_whatever_its_header_says(size: int) -> None:
    data = encoded("RF64", "PCM_16")

    assert whole(put(data, data.index(b"ds64") + 8, "<QQQ", size, size, size))


@pytest.mark.parametrize("kind", ["WAV", "WAVEX"])
@pytest.mark.parametrize("order", ["LITTLE", "BIG"])
def test_a_wav_of_either_order_is_read_to_its_end(kind: str, order: str) -> None:
    if (kind, order) == ("WAVEX", "BIG"):
        order = "FILE"
    data = encoded(kind, "PCM_16", endian=order)

    assert whole(put(data, data.index(b"data") + 4, "<I", 0))


@pytest.mark.parametrize("riff_size", [0, 0xFFFF_FFFF, 36])
def test_a_recorder_that_died_left_sizes_of_nothing(riff_size: int) -> None:
    assert whole(put(put(WAV, DATA, "<I", 0), 4, "<I", riff_size))


@pytest.mark.parametrize(
    "after", [b"LIST\4\0\0\0INFO", b"LIST\3\0\0\0INF\0junk\0\0\0\0", b"TAG" + bytes(125), b"\0\0\0"]
)
@pytest.mark.parametrize("odd", [b"", b"\x80"])
def test_chunks_after_the_samples_are_no_audio(after: bytes, odd: bytes) -> None:
    data = encoded("WAV", "PCM_U8", sound(SECONDS, 32_000)[: 128_000 - len(odd)], 32_000)
    data = data[: data.index(b"data") + 8 + 128_000 - len(odd)]

    seconds, _ = read(data + (odd and b"\0") + after)

    assert seconds == (128_000 - len(odd)) / 32_000


def test_a_wav_that_was_whole_once_and_is_cut_is_refused() -> None:
    assert (
        refusal(WAV[: len(WAV) // 2])
        == "continuation ends in the middle; use a file that is whole."
    )


@pytest.mark.parametrize("riff_size", [0, 36, 0xFFFF_FFFF])
def test_a_wav_whose_samples_are_fewer_than_it_says_is_refused(riff_size: int) -> None:
    data = put(WAV[: len(WAV) // 2], 4, "<I", riff_size)

    assert refusal(data) == "continuation ends in the middle; use a file that is whole."


def test_an_rf64_whose_samples_are_fewer_than_it_says_is_refused() -> None:
    assert "ends in the middle" in refusal(encoded("RF64", "PCM_16")[:-1_000])


WAV_8 = encoded("WAV", "PCM_U8")


@pytest.mark.parametrize("other", ["WAV", "RF64", "FLAC", "OGG", "MP3", "AIFF", "CAF", "W64"])
@pytest.mark.parametrize("first", ["WAV", "FLAC", "OGG", "MP3"])
@pytest.mark.parametrize("padding", [0, 1, 100])
def test_a_second_file_after_the_first_is_refused(first: str, other: str, padding: int) -> None:
    if first == other and (first == "MP3" or (first == "OGG" and not padding)):
        pytest.skip("these are read one after the other")
    data = encoded(first) + bytes(padding) + encoded(other)

    assert re.match("continuation (holds something else after its audio|is damaged)", refusal(data))


@pytest.mark.parametrize("size", [0, 0xFFFF_FFFF])
def test_a_second_wav_after_one_that_says_no_size_is_refused(size: int) -> None:
    assert "holds something else after its audio" in refusal(put(WAV, DATA, "<I", size) + WAV)


def test_an_mp3_with_its_tag_after_a_wav_is_refused() -> None:
    assert "holds something else after its audio" in refusal(WAV + id3(100) + VBR)


@pytest.mark.parametrize(
    "first", [WAV, WAV_8[: WAV_8.index(b"data") + 4] + b"\1\0\0\0\x80\0"], ids=["16", "8"]
)
def test_a_wav_with_two_blocks_of_samples_is_refused(first: bytes) -> None:
    data = first + b"LIST\4\0\0\0INFO" + WAV[DATA - 4 :]

    assert "holds something else after its audio" in refusal(put(data, 4, "<I", len(data) - 8))


@pytest.mark.parametrize(
    ("start", "form", "value", "problem"),
    [
        (
            28,
            "<I",
            44_100,
            "says 44,100 bytes a second, but its sample rate and frame size give 88,200",
        ),
        (
            24,
            "<I",
            48_000,
            "says 88,200 bytes a second, but its sample rate and frame size give 96,000",
        ),
        (32, "<H", 4, "says 4 bytes a frame, but its channels and bits give 2"),
        (22, "<H", 2, "says 2 bytes a frame, but its channels and bits give 4"),
        (34, "<H", 8, "says 2 bytes a frame, but its channels and bits give 1"),
    ],
)
def test_a_wav_whose_header_contradicts_itself_is_refused(
    start: int, form: str, value: int, problem: str
) -> None:
    assert (
        refusal(put(WAV, start, form, value))
        == f"continuation {problem}; use a file whose header is right."
    )


def test_a_header_that_promises_another_length_is_told(caplog) -> None:
    read(put(WAV, DATA, "<I", SAMPLES // 2))

    assert caplog.messages == [
        "continuation: its header says 2 s, but it holds 4 s of audio, all of which is used"
    ]


@pytest.mark.parametrize("kind", ["WAV", "WAVEX", "RF64", "FLAC", "OGG", "MP3"])
def test_an_honest_file_gives_no_warning(kind: str, caplog) -> None:
    read(encoded(kind))

    assert caplog.messages == []


@pytest.mark.parametrize("kind", ["AIFF", "AU", "W64", "CAF"])
def test_other_containers_are_refused_by_name(kind: str) -> None:
    assert (
        refusal(encoded(kind, "PCM_16"))
        == f"continuation is audio of the format {kind}; use WAV, FLAC, MP3 or OGG."
    )


# FLAC

FLAC = encoded("FLAC", "PCM_16")


def promising(samples: int, data: bytes = FLAC) -> bytes:
    facts = int.from_bytes(data[18:26], "big") >> 36 << 36
    return data[:18] + (facts | samples).to_bytes(8, "big") + data[26:]


@pytest.mark.parametrize("samples", [0, 1, 1_000, SECONDS * RATE - 1])
@pytest.mark.parametrize("has_md5", [True, False])
def test_a_flac_is_read_to_its_end_whatever_its_header_says(samples: int, has_md5: bool) -> None:
    data = promising(samples)

    assert whole(data if has_md5 else data[:26] + bytes(16) + data[42:])


@pytest.mark.parametrize("lost", [1, 2, 100, len(FLAC) // 2])
@pytest.mark.parametrize("samples", [0, SECONDS * RATE])
def test_a_flac_that_is_cut_is_refused(lost: int, samples: int) -> None:
    assert refusal(promising(samples)[:-lost]) == (
        "continuation is damaged, or ends in the middle; use a file that is whole."
    )


def flac_frames(data: bytes) -> list[int]:
    """Return where frames of 4,096 samples begin, and the last."""
    return [found.start() for found in re.finditer(rb"\xff\xf8[\xc9\x79]\x08", data)]


@pytest.mark.parametrize("samples", [SECONDS * RATE + 1, 50 * RATE, 2**36 - 1])
def test_a_flac_that_holds_less_than_it_says_is_refused(samples: int) -> None:
    assert "is damaged, or ends in the middle" in refusal(promising(samples))
    assert "is damaged, or ends in the middle" in refusal(FLAC[: flac_frames(FLAC)[-1]])


@pytest.mark.parametrize("samples", [0, 1_000, SECONDS * RATE])
def test_a_flac_without_some_of_its_frames_is_refused(samples: int) -> None:
    data, starts = promising(samples), flac_frames(FLAC)

    assert refusal(data[: starts[10]] + data[starts[12] :]).startswith(
        "continuation is damaged: frames of it are missing"
    )


def test_a_flac_with_a_flipped_bit_is_refused() -> None:
    assert refusal(put(FLAC, len(FLAC) // 2, "B", FLAC[len(FLAC) // 2] ^ 1)).startswith(
        "continuation is damaged"
    )


# OGG


def pages(data: bytes) -> list[bytes]:
    found = []
    while data:
        end = 27 + data[26] + sum(data[27 : 27 + data[26]])
        found.append(data[:end])
        data = data[end:]
    return found


def checksum(page: bytes) -> int:
    """Return Ogg's CRC, bit by bit as RFC 3533 has it."""
    crc = 0
    for byte in page:
        crc ^= byte << 24
        for _ in range(8):
            crc = (crc << 1 ^ (0x04C11DB7 if crc >> 31 else 0)) & 0xFFFF_FFFF
    return crc


def at(page: bytes, position: int, flags: int | None = None) -> bytes:
    page = put(put(page, 6, "<Q", position % 2**64), 22, "<I", 0)
    page = page if flags is None else put(page, 5, "B", flags)
    return put(page, 22, "<I", checksum(page))


VORBIS, OPUS = encoded("OGG", "VORBIS"), encoded("OGG", "OPUS", rate=48_000)
OGGS = pytest.mark.parametrize("data", [VORBIS, OPUS], ids=["vorbis", "opus"])


@OGGS
def test_a_chain_is_read_to_its_end(data: bytes) -> None:
    assert whole(data + data + data, 3 * SECONDS)


@OGGS
@pytest.mark.parametrize("position", [0, 1_000, 2**50, -1])
def test_an_ogg_is_read_to_its_end_whatever_its_last_page_says(data: bytes, position: int) -> None:
    *others, last = pages(data)

    assert whole(b"".join(others) + at(last, position))


def test_positions_that_say_nothing_hide_nothing() -> None:
    first, *others = pages(VORBIS)

    assert whole(first + b"".join(at(page, 0) for page in others))


@OGGS
def test_a_stream_that_was_joined_late_is_read_to_its_end(data: bytes) -> None:
    found = pages(data)
    heads = sum(struct.unpack_from("<Q", page, 6)[0] == 0 for page in found)
    late = [at(page, struct.unpack_from("<Q", page, 6)[0] + 480_000) for page in found[heads:]]

    assert whole(b"".join([*found[:heads], *late]))


@OGGS
def test_an_ogg_whose_last_page_is_missing_is_refused(data: bytes) -> None:
    *others, last = pages(data)

    for end in (b"", at(last, struct.unpack_from("<Q", last, 6)[0], flags=0)):
        assert (
            refusal(b"".join(others) + end)
            == "continuation is cut: its end is missing; use a file that is whole."
        )
    assert "its end is missing" in refusal(b"".join(others) + data)


@OGGS
def test_a_last_page_that_would_trim_more_than_a_packet_is_not_believed(data: bytes) -> None:
    *others, last = pages(data)
    before = struct.unpack_from("<Q", others[-1], 6)[0]

    assert whole(b"".join(others) + at(last, before + 1))


@OGGS
@pytest.mark.parametrize("position", [0, 1, 100, 10**9, -1])
@pytest.mark.parametrize("number", [0, 1, -2])
def test_a_position_on_the_way_shortens_nothing(data: bytes, position: int, number: int) -> None:
    found = pages(data)
    heads = sum(struct.unpack_from("<Q", page, 6)[0] == 0 for page in found)
    number = number if number < 0 else heads + number
    found[number] = at(found[number], position)

    assert read(b"".join(found))[0] == pytest.approx(SECONDS, abs=0.001)


@OGGS
def test_the_silence_that_an_encoder_added_to_an_ogg_is_taken_away(data: bytes) -> None:
    assert read(data)[0] == SECONDS


def test_an_opus_that_would_skip_more_than_any_encoder_adds_is_refused() -> None:
    first, *others = pages(OPUS)
    data = at(put(first, 38, "<H", 60_000), 0) + b"".join(others)

    assert refusal(data) == "continuation skips 1.25 s at its start; use a file that is whole."


@OGGS
@pytest.mark.parametrize("lost", [1, 100, 20_000])
def test_an_ogg_that_is_cut_is_refused(data: bytes, lost: int) -> None:
    assert refusal(data[:-lost]) == "continuation ends in the middle; use a file that is whole."


@OGGS
def test_an_ogg_with_a_flipped_bit_is_refused(data: bytes) -> None:
    middle = len(data) // 2

    assert "a page of it does not have its checksum" in refusal(
        put(data, middle, "B", data[middle] ^ 1)
    )


@OGGS
def test_an_ogg_without_one_of_its_pages_is_refused(data: bytes) -> None:
    found = pages(data)

    assert "a page of it is missing" in refusal(b"".join(found[:-2] + found[-1:]))


def test_a_chain_that_changes_its_channels_is_refused() -> None:
    other = encoded("OGG", "VORBIS", sound(1, channels=2))

    assert (
        refusal(VORBIS + other)
        == "continuation changes its sample rate or channels on the way; use another clip."
    )


# MP3

KBITS = (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320)


def mp3(mode: str = "VARIABLE", seconds: float = SECONDS) -> bytes:
    return encoded(
        "MP3", "MPEG_LAYER_III", sound(seconds), bitrate_mode=mode, compression_level=0.5
    )


def frames(data: bytes) -> list[bytes]:
    """Return the frames of an MP3 of 44,100 Hz."""
    found = []
    while data:
        size = 144_000 * KBITS[data[2] >> 4] // RATE + (data[2] >> 1 & 1)
        found.append(data[:size])
        data = data[size:]
    return found


VBR = mp3()
NO_TAG = b"".join(frames(VBR)[1:])
COUNT = VBR.index(b"Xing") + 8
ID3 = b"ID3\4\0\0\0\0\7\x76" + b"TIT2\0\0\7\4\0\0" + b"\xff\xfb\x90" * 300 + bytes(104)
APE = b"x" * 40 + b"APETAGEX" + struct.pack("<IIII", 2000, 72, 1, 0) + bytes(8)
VBRI = put(frames(mp3("CONSTANT"))[1], 36, ">4sHHHII", b"VBRI", 1, 0, 75, 1_000, 7)


@pytest.mark.parametrize("mode", ["CONSTANT", "AVERAGE", "VARIABLE"])
def test_an_mp3_without_a_tag_is_read_to_its_end(mode: str) -> None:
    assert whole(b"".join(frames(mp3(mode))[1:]))


@pytest.mark.parametrize("count", [100_000, 2**32 - 1])
def test_an_mp3_that_holds_less_than_it_says_is_refused(count: int) -> None:
    for data in (put(VBR, COUNT, ">I", count), put(VBRI, 36 + 14, ">I", count) + NO_TAG):
        assert re.match(
            r"continuation holds only 4\.0\d s of the [\d,.]+ s that its header promises;",
            refusal(data),
        )


@pytest.mark.parametrize("lost", [slice(20, 30), slice(-2, None)])
def test_an_mp3_without_some_of_its_frames_is_refused(lost: slice) -> None:
    found = frames(VBR)
    del found[lost]

    assert "holds only" in refusal(b"".join(found))
    assert "holds only" in refusal(b"".join(found) + VBR)


@pytest.mark.parametrize("other", [(RATE, 2), (32_000, 1), (48_000, 2), (22_050, 1)])
def test_mp3_files_of_two_kinds_put_together_are_refused(other: tuple[int, int]) -> None:
    rate, channels = other
    second = encoded("MP3", samples=sound(1, rate, channels), rate=rate)

    for data in (VBR + second, second + VBR, NO_TAG + ID3 + second):
        assert (
            refusal(data)
            == "continuation changes its sample rate or channels on the way; use another clip."
        )


def id3(size: int, body: bytes = bytes(100)) -> bytes:
    return b"ID3\3\0\0" + bytes(size >> shift & 127 for shift in (21, 14, 7, 0)) + body


@pytest.mark.parametrize("size", [101, 2_000, len(VBR) // 2, len(VBR) - 1_000])
def test_a_tag_that_claims_frames_is_refused(size: int) -> None:
    ape = (
        b"APETAGEX"
        + struct.pack("<IIII", 2000, sum(map(len, frames(VBR)[-20:])) + 32, 1, 0)
        + bytes(8)
    )

    for data in (id3(size) + VBR, VBR + id3(size) + VBR, VBR + ape):
        assert (
            refusal(data)
            == "continuation has a tag that reaches into its audio; use a file that is whole."
        )


def test_a_tag_full_of_what_looks_like_frames_is_passed_over() -> None:
    # frames of 576 bytes begin at every fourth one
    body = b"\xff\xfb\xb4\xc0" * 1_000_000 + bytes(3_000)

    assert whole(id3(len(body), body) + VBR)


@pytest.mark.parametrize("count", [0, 1, 10])
def test_an_mp3_is_read_to_its_end_whatever_its_tag_says(count: int) -> None:
    assert whole(put(VBR, COUNT, ">I", count))
    assert whole(put(VBRI, 36 + 14, ">I", count) + NO_TAG)


@pytest.mark.parametrize("size", [0, 1, 2**32 - 1])
def test_a_tag_that_lies_about_bytes_changes_nothing(size: int, capfd) -> None:
    assert whole(put(VBR, COUNT + 4, ">I", size))
    assert capfd.readouterr().err == ""


def test_a_tag_that_would_trim_more_than_any_encoder_adds_is_not_believed() -> None:
    assert whole(put(VBR, VBR.index(b"LAME") + 21, "3B", 0xFF, 0xFF, 0xFF))


@pytest.mark.parametrize(
    "data",
    [ID3 + VBR, VBR + b"TAG" + bytes(125), VBR + APE, VBR + APE + b"TAG" + bytes(125), ID3 + NO_TAG + APE,
     bytes(3_000) + VBR, VBR + bytes(3_000), NO_TAG + b"what is this?" * 50],
)  # fmt: skip
def test_what_stands_around_an_mp3_is_no_audio(data: bytes, capfd) -> None:
    assert whole(data)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("between", [b"", ID3, b"TAG" + bytes(125) + ID3])
def test_mp3_files_put_together_are_read_to_the_last_end(between: bytes) -> None:
    assert whole(VBR + between + VBR, 2 * SECONDS + 0.05)


@pytest.mark.parametrize("lost", [1, 100, len(VBR) // 2])
def test_an_mp3_that_is_cut_is_refused(lost: int) -> None:
    assert (
        refusal(VBR[:-lost])
        == "continuation ends in the middle of a frame; use a file that is whole."
    )


@pytest.mark.parametrize("junk", [b"x" * 500, b"\xff" * 500, b"x" * 3])
def test_an_mp3_with_something_else_in_its_middle_is_refused(junk: bytes) -> None:
    found = frames(VBR)

    assert "is damaged 1.2" in refusal(b"".join([*found[:50], junk, *found[50:]]))


def test_an_mp3_in_a_wav_is_read_to_its_end() -> None:
    fmt = struct.pack("<HHIIHHHHIHHH", 0x55, 1, RATE, 16_000, 1, 0, 12, 1, 2, 417, 1, 0)
    header = b"WAVEfmt " + struct.pack("<I", len(fmt)) + fmt + b"data\0\0\0\0"

    assert whole(b"RIFF\0\0\0\0" + header + NO_TAG)


def test_the_decoder_says_nothing_of_its_own(capfd) -> None:
    found = frames(VBR)
    for number, frame in itertools.islice(enumerate(found), 20, 60):
        found[number] = frame[:4] + bytes(byte ^ 0x5A for byte in frame[4:40]) + frame[40:]

    with suppress(InvalidRequestError):
        read(b"".join(found))
    assert capfd.readouterr().err == ""


BAD_FMT = struct.pack("<HHIIHH", 0x55, 1, RATE, 16_000, 1, 0)


@pytest.mark.parametrize(
    "data",
    [VBR[:1_000], b"\xff\xfb\x90\xc4" + bytes(9_000), b"\xff\xfb\0\xc4" * 900,
     b"RIFF\0\0\0\0WAVEfmt \x10\0\0\0" + BAD_FMT + b"LIST\0\0\0\0" + NO_TAG,
     b"RIFF\0\0\0\0WAVEfmt \x10\0\0\0" + BAD_FMT + b"data\0\0\0\0" + bytes(9_000)],
)  # fmt: skip
def test_what_only_looks_like_an_mp3_is_refused_without_a_word_of_the_decoder(
    data: bytes, capfd
) -> None:
    assert re.match(
        "continuation (is not audio that can be read|ends in the middle)", refusal(data)
    )
    assert capfd.readouterr().err == ""


def test_a_long_mp3_says_how_long_it_is() -> None:
    data = NO_TAG * 8

    assert refusal(data).startswith(
        f"continuation is {8 * len(frames(NO_TAG)) * 1152 / RATE:g} s long; use a clip of"
    )


@pytest.mark.parametrize("count", [1, 1_600])
def test_a_melody_of_a_long_mp3_has_all_of_the_seconds_that_are_kept(
    count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clips, "MELODY_SECONDS", 30)
    data = mp3("CONSTANT", 40)

    assert read(put(data, data.index(b"Info") + 8, ">I", count), "melody")[0] == 30
