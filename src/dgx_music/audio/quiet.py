"""A program: decodes the MP3 on stdin to float32 on stdout, after its rate and channels (uint32).

It imports nothing else of this package, and no NumPy, so that it starts quickly.
"""

import array
import io
import sys

import soundfile

BLOCK_FRAMES = 65_536


class Stream(soundfile.SoundFile):  # type: ignore[misc]  # it has no types
    """A file that is only read on."""

    def seekable(self) -> bool:
        """Return ``False``: the tag in front is believed for no seeking."""
        return False


def main() -> None:
    """Decode to the end; the exit code is 1 if that fails."""
    with Stream(io.BytesIO(sys.stdin.buffer.read())) as file:
        sys.stdout.buffer.write(array.array("I", [file.samplerate, file.channels]).tobytes())
        frame_bytes = 4 * file.channels
        block = memoryview(bytearray(BLOCK_FRAMES * frame_bytes))
        while count := file.buffer_read_into(block, dtype="float32"):
            sys.stdout.buffer.write(block[: count * frame_bytes])


if __name__ == "__main__":
    main()
