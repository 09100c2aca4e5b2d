"""MP3, and layers I and II: the frames are followed, and stored again behind a correct tag.

Without a tag libmpg123 guesses the number of frames from the first ones; with a tag it believes the
number that the tag gives.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from dgx_music.audio.containers.interface import OTHER_AUDIO, DamagedError, Source, skip_id3

_LAYER_I, _LAYER_II, _LAYER_III = 3, 2, 1  # as the header numbers them
_VERSION_1 = 3
_KBITS = {
    (True, _LAYER_I): tuple(range(0, 449, 32)),
    (True, _LAYER_II): (0, 32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (True, _LAYER_III): (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (False, _LAYER_I): (0, 32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    (False, _LAYER_II): (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
    (False, _LAYER_III): (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
_RATES = (44_100, 48_000, 32_000)
_RATE_DIVISORS = {_VERSION_1: 1, 2: 2, 0: 4}
_LONGEST_PADDING = 65_536
"""Bytes that are searched for the first frame; a file whose frames begin later is no MP3."""
_LONGEST_REST = 2**14
"""Bytes after the last frame that are searched for more frames; tags with lyrics are shorter."""
_MOST_SILENT_FRAMES = 4
"""No encoder adds more than that before and after the music together."""
_TAG_KBITS_INDEX = {True: 9, False: 8}
_HAS_COUNT = 1
_SPARE_SECONDS = 1
"""Read beyond the end: the silence that an encoder added is removed from there."""
_TAG_FRAMES = 1
"""Some encoders count the frame that holds the count."""
_THREE_FRAMES = 3 * 2_881
"""Bytes that three frames have at most."""
_LAME_BYTES = 36
_ZEROS = re.compile(rb"\0*")


@dataclass(frozen=True)
class _Header:
    """The first four bytes of a frame."""

    data: bytes
    kind: tuple[int, int, int]
    """What all frames of a file have in common: version and layer, rate, and whether mono."""
    rate: int
    size: int
    samples: int

    @property
    def tag_start(self) -> int:
        """Where a tag stands in a frame of layer III, after its side information."""
        is_mono = self.data[3] >> 6 == 3
        return (
            (4 + 17 if is_mono else 4 + 32)
            if self.samples == 1152
            else (4 + 9 if is_mono else 4 + 17)
        )


@dataclass
class _Frames:
    """The frames one after the other, without those that are tags."""

    first: _Header
    parts: list[bytes] = field(default_factory=list)
    tags: list[bytes] = field(default_factory=list)
    are_all: bool = False

    @property
    def seconds(self) -> float:
        return len(self.parts) * self.first.samples / self.first.rate


def find_source(content: bytes, longest_seconds: float) -> Source | None:
    """Return the frames of an MP3, of at least the first ``longest_seconds``; ``None`` if it is no MP3.

    Raises ``DamagedError`` if the last frame is cut, or if there is something else between them.
    """
    start = _find_first(content)
    if start is None:
        return None
    frames = _walk(content, start, longest_seconds)
    _check_count(frames)
    first, silence = frames.first, _lame_extension(frames)
    return Source(
        [_make_tag(frames, silence) + b"".join(frames.parts)],
        _promised_seconds(frames, silence),
        is_mpeg=True,
        seconds=frames.seconds - _silent_samples(silence) / first.rate,
    )


def _find_first(content: bytes) -> int | None:
    """Return the position of three frames of one kind in a row, or of all up to the end."""
    start = content.find(b"\xff", 0, _LONGEST_PADDING)
    while start != -1:
        if is_run(content, start):
            return start
        start = content.find(b"\xff", start + 1, _LONGEST_PADDING)
    return None


def is_run(content: bytes, start: int) -> bool:
    """Return whether three frames of one kind, or all up to the end, follow in a row from here."""
    first = header = _read_header(content, start)
    for _ in range(2):
        if header is None or first is None or header.kind != first.kind:
            return False
        start += header.size
        if start >= len(content):
            return start == len(content)
        header = _read_header(content, start)
    return header is not None and first is not None and header.kind == first.kind


def _walk(content: bytes, start: int, longest_seconds: float) -> _Frames:
    first = _read_header(content, start)
    assert first is not None  # noqa: S101 - a run of frames begins there
    frames = _Frames(first)
    while frames.seconds <= longest_seconds + _SPARE_SECONDS:
        header = _read_header(content, start)
        if header is not None and header.kind == first.kind:
            frame = content[start : start + header.size]
            if len(frame) < header.size:
                raise DamagedError("ends in the middle of a frame")
            (frames.tags if _is_tag(frame, header) else frames.parts).append(frame)
            start += header.size
            continue
        after = _skip_tags(content, start)
        if after == start:
            _check_end(content, start, frames)
            frames.are_all = True
            break
        start = after
    return frames


def _check_end(content: bytes, start: int, frames: _Frames) -> None:
    """Raise if more frames follow after what stands here: then a frame is damaged."""
    end = min(start + _LONGEST_REST, len(content))
    position = content.find(b"\xff", start, end)
    while position != -1:
        if is_run(content, position):
            raise _broken_by(content, position, frames)
        position = content.find(b"\xff", position + 1, end)
    if OTHER_AUDIO.search(content, start, end):
        raise DamagedError("holds something else after its audio")
    if end == start + _LONGEST_REST:
        raise DamagedError("has too many bytes after the end of its audio")
    if content.startswith(b"\xff", start) and end - start < 4:
        raise DamagedError(f"is damaged {frames.seconds:.2f} s after its start")


def _broken_by(content: bytes, start: int, frames: _Frames) -> DamagedError:
    """Return what is wrong if frames follow here later, or of another kind."""
    header = _read_header(content, start)
    if header is not None and header.kind != frames.first.kind:
        return DamagedError("changes its sample rate or channels on the way", "use another clip")
    return DamagedError(f"is damaged {frames.seconds:.2f} s after its start")


def check_tag(content: bytes, start: int, end: int) -> None:
    """Raise if the tag that begins here holds frames that go on to its end or beyond."""
    position = content.find(b"\xff", max(start, end - _THREE_FRAMES), end)
    while position != -1:
        if is_run(content, position) and _reaches(content, position, end):
            raise DamagedError("has a tag that reaches into its audio")
        position = content.find(b"\xff", position + 1, end)


def _reaches(content: bytes, start: int, end: int) -> bool:
    first = header = _read_header(content, start)
    while start < end and header is not None and first is not None and header.kind == first.kind:
        start += header.size
        header = _read_header(content, start)
    is_frame = header is not None and first is not None and header.kind == first.kind
    return start >= len(content) or is_frame or content.startswith(b"APETAGEX", start)


def _skip_tags(content: bytes, start: int) -> int:
    """Return where the next frame can begin: joined files have tags in the middle."""
    if content.startswith(b"TAG", start):
        return min(start + 128, len(content))
    end = min(skip_id3(content, start), len(content))
    check_tag(content, start, end)
    found = _ZEROS.match(content, end)
    return found.end() if found else start


def _read_header(content: bytes, start: int) -> _Header | None:
    data = content[start : start + 4]
    if len(data) < 4 or data[0] != 0xFF or data[1] & 0xE0 != 0xE0:
        return None
    version, layer = data[1] >> 3 & 3, data[1] >> 1 & 3
    kbits, rate = data[2] >> 4, data[2] >> 2 & 3
    if version == 1 or layer == 0 or kbits in (0, 15) or rate == 3:
        return None
    is_first_version = version == _VERSION_1
    hertz = _RATES[rate] // _RATE_DIVISORS[version]
    bits = _KBITS[is_first_version, layer][kbits] * 1_000
    is_padded = data[2] >> 1 & 1
    samples = (
        384 if layer == _LAYER_I else 576 if layer == _LAYER_III and not is_first_version else 1152
    )
    size = (
        (12 * bits // hertz + is_padded) * 4
        if layer == _LAYER_I
        else samples // 8 * bits // hertz + is_padded
    )
    return _Header(data, (data[1] & 0xFE, rate, data[3] >> 6 == 3), hertz, size, samples)


def _is_tag(frame: bytes, header: _Header) -> bool:
    return frame[header.tag_start :][:4] in (b"Xing", b"Info") or frame[36:40] == b"VBRI"


def _check_count(frames: _Frames) -> None:
    """Raise if there are fewer frames than the tags of all joined files say."""
    promised = sum(_promised_frames(frames, tag) for tag in frames.tags)
    if frames.are_all and promised > len(frames.parts) + _TAG_FRAMES:
        said = promised * frames.first.samples / frames.first.rate
        raise DamagedError(
            f"holds only {frames.seconds:,.2f} s of the {said:,.2f} s that its header promises"
        )


def _promised_seconds(frames: _Frames, silence: bytes) -> float | None:
    """Return the length by the file's only tag if that is too short; else ``None``."""
    if len(frames.tags) != 1 or not frames.are_all:
        return None
    promised = _promised_frames(frames, frames.tags[0])
    if not 0 < promised < len(frames.parts):
        return None
    return (promised * frames.first.samples - _silent_samples(silence)) / frames.first.rate


def _promised_frames(frames: _Frames, tag: bytes) -> int:
    """Return the number of frames in a tag, 0 if it has none."""
    if tag[36:40] == b"VBRI":
        return int.from_bytes(tag[36 + 14 : 36 + 18], "big")
    start = frames.first.tag_start
    return int.from_bytes(tag[start + 8 : start + 12], "big") if tag[start + 7] & _HAS_COUNT else 0


def _lame_extension(frames: _Frames) -> bytes:
    """Return the tag's part about silence that an encoder added; empty if missing."""
    start = frames.first.tag_start
    if len(frames.tags) != 1 or frames.tags[0][start : start + 4] not in (b"Xing", b"Info"):
        return b""
    tag = frames.tags[0]
    flags = tag[start + 7]
    start += (
        8
        + (4 * (flags & 1))
        + (4 * (flags >> 1 & 1))
        + (100 * (flags >> 2 & 1))
        + (4 * (flags >> 3 & 1))
    )
    extension = tag[start : start + _LAME_BYTES]
    is_credible = _silent_samples(extension) <= _MOST_SILENT_FRAMES * frames.first.samples
    return extension if is_credible and extension[:4] in (b"LAME", b"Lavf", b"Lavc") else b""


def _silent_samples(extension: bytes) -> int:
    packed = int.from_bytes(extension[21:24], "big")
    return (packed >> 12) + (packed & 0xFFF)


def _make_tag(frames: _Frames, extension: bytes) -> bytes:
    """Return a frame without sound that says how many frames follow; layers I and II know none."""
    first = frames.first
    is_first_version = first.data[1] >> 3 & 3 == _VERSION_1
    if first.data[1] >> 1 & 3 != _LAYER_III:
        return b""
    data = bytes(
        [
            0xFF,
            first.data[1] | 1,
            _TAG_KBITS_INDEX[is_first_version] << 4 | first.data[2] & 0x0C,
            first.data[3],
        ]
    )
    header = _read_header(data, 0)
    assert header is not None  # noqa: S101
    words = (
        b"Info" + _HAS_COUNT.to_bytes(4, "big") + len(frames.parts).to_bytes(4, "big") + extension
    )
    return (data + bytes(header.tag_start - 4) + words).ljust(header.size, b"\0")
