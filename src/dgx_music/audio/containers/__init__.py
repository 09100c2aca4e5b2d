"""Audio files as others write them: what is in them, whatever their headers say.

A length in a header is a guess: recorders, pipes and cutting tools write none or a wrong one, and a decoder that believes
it ends early without a word. So each container is walked here to its true end, and handed on with nothing left to believe.
Where what is there stops in the middle, or is damaged on the way, it is refused.
"""

from dgx_music.audio.containers import flac, mpeg, ogg, riff
from dgx_music.audio.containers.interface import READABLE, DamagedError, Source, find_tags

_TAKEN_FOR_MPEG = (b"\xff", b"ID3")
"""libsndfile would give what starts so to libmpg123, which would write to stderr that it is none."""

__all__ = ["READABLE", "DamagedError", "Source", "open_source"]


def open_source(content: bytes, longest_seconds: float) -> Source:
    """Return what a decoder is to be given, of the first so many seconds at least; raises ``DamagedError``.

    A container that is not known here is handed on as it is, to be refused by name.
    """
    start, end = find_tags(content)
    mpeg.check_tag(content, 0, start)
    mpeg.check_tag(content, end, len(content))
    content = content[start:end]
    if content[:4] in (b"RIFF", b"RIFX", b"RF64"):
        return riff.open_source(content, longest_seconds)
    if content[:4] == b"fLaC":
        return flac.open_source(content)
    if content[:4] == b"OggS":
        return ogg.open_source(content)
    found = mpeg.find_source(content, longest_seconds)
    if found is None and content.startswith(_TAKEN_FOR_MPEG):
        raise DamagedError("is not audio that can be read", READABLE)
    return found or Source([content])
