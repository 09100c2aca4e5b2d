"""Audio files as other programs write them: their true content, whatever their headers say.

A length in a header is a guess: recorders, pipes and cutting tools write none or a wrong one, and a
decoder that believes it ends too early, without an error. So each container is followed to its true
end, and then handed on without any length to believe. A file that stops in the middle, or is
damaged, is refused.
"""

from dgx_music.audio.containers import flac, mpeg, ogg, riff
from dgx_music.audio.containers.interface import READABLE, DamagedError, Source, find_tags

_TAKEN_FOR_MPEG = (b"\xff", b"ID3")
"""libsndfile would hand such a file to libmpg123, which writes to stderr that it is no MP3."""

__all__ = ["READABLE", "DamagedError", "Source", "open_source"]


def open_source(content: bytes, longest_seconds: float) -> Source:
    """Return what a decoder should get, of at least the first ``longest_seconds``; raises ``DamagedError``.

    An unknown container is returned as it is; the decoder then refuses it by name.
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
