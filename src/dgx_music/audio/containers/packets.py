"""How much audio the packets of an Ogg stream hold: Vorbis, and Opus (RFC 6716, 7845)."""

from __future__ import annotations

from collections.abc import Sequence

from dgx_music.audio.containers.interface import DamagedError

_VORBIS, _OPUS = b"\1vorbis", b"OpusHead"
_VORBIS_HEADERS, _OPUS_HEADERS = 3, 2
_OPUS_RATE = 48_000
_LONGEST_SKIP = 12_000
"""A quarter of a second: an encoder needs a hundredth of a second, a cut a third."""
_MODE_BITS = 41
_MOST_MODES = 64


def lengths(packets: Sequence[bytes]) -> list[int] | None:
    """Return the samples that each packet adds; ``None`` if the codec is unknown.

    Headers add none. Raises ``DamagedError`` if the headers are not valid.
    """
    if packets and packets[0].startswith(_VORBIS):
        return _vorbis_lengths(packets)
    if packets and packets[0].startswith(_OPUS):
        return _opus_lengths(packets)
    return None


def _opus_lengths(packets: Sequence[bytes]) -> list[int]:
    skip = int.from_bytes(packets[0][10:12], "little")
    if skip > _LONGEST_SKIP:
        raise DamagedError(f"skips {skip / _OPUS_RATE:.2f} s at its start")
    return [0] * _OPUS_HEADERS + [_opus_length(packet) for packet in packets[_OPUS_HEADERS:]]


def _opus_length(packet: bytes) -> int:
    if not packet:
        return 0
    config, code = packet[0] >> 3, packet[0] & 3
    if config < 12:
        frame = (480, 960, 1_920, 2_880)[config & 3]
    else:
        frame = (480, 960)[config & 1] if config < 16 else (120, 240, 480, 960)[config & 3]
    return frame * ((packet[1] & 63 if len(packet) > 1 else 0) if code == 3 else 2 if code else 1)


def _vorbis_lengths(packets: Sequence[bytes]) -> list[int]:
    """Return how many samples each packet adds.

    That is the overlap of its block with the block before it, so the first packet adds none.
    """
    if len(packets) < _VORBIS_HEADERS or len(packets[0]) < 30:
        raise DamagedError("is damaged: its headers are not whole")
    blocks = 1 << (packets[0][28] & 15), 1 << (packets[0][28] >> 4)
    modes = _vorbis_modes(packets[2])
    mode_mask = (1 << (len(modes) - 1).bit_length()) - 1
    found, before = [0] * _VORBIS_HEADERS, 0
    for packet in packets[_VORBIS_HEADERS:]:
        mode = packet[0] >> 1 & mode_mask if packet and not packet[0] & 1 else len(modes)
        # A decoder leaves out a packet that is no audio.
        block = blocks[modes[mode]] if mode < len(modes) else 0
        found.append((before + block) // 4 if before and block else 0)
        before = block or before
    return found


def _vorbis_modes(setup: bytes) -> list[bool]:
    """Return for each mode whether its block is long.

    The modes are at the end of the header, before one bit that is set. What comes before them could
    only be skipped by parsing all of it, so this searches for the number of modes from the end.
    """
    bits = int.from_bytes(setup, "little")
    end = bits.bit_length() - 1
    modes: list[bool] = []
    found: list[bool] = []
    while len(modes) < _MOST_MODES and (end := end - _MODE_BITS) >= 6:
        mode = bits >> end & (1 << _MODE_BITS) - 1
        # Only one type of window and of transform exists: both are 0.
        if mode >> 1 & 0xFFFF_FFFF or mode >> 33 > 63:
            break
        modes.insert(0, bool(mode & 1))
        if bits >> end - 6 & 63 == len(modes) - 1:
            found = list(modes)
    if not found:
        raise DamagedError("is damaged: its headers are not whole")
    return found
