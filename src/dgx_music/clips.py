"""The former place of ``dgx_music.audio.clips``: programs that import it from here go on."""

from dgx_music.audio.clips import Clip, Reader, load

__all__ = ["Clip", "Reader", "load"]
