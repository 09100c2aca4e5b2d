"""The worker daemon, the same as ``dgx-music worker``: ``python worker.py --help`` lists its options."""

import sys

from dgx_music.cli import main

if __name__ == "__main__":
    sys.exit(main(["worker", *sys.argv[1:]]))
