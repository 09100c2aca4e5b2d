"""``python -m dgx_music.cli``, the same as ``dgx-music``."""

import sys

from dgx_music.cli import main

if __name__ == "__main__":
    sys.exit(main())
