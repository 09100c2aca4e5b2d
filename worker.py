"""The worker daemon, the same as ``dgx-music worker``: ``python worker.py --help`` lists its options."""

import sys

if __name__ == "__main__":
    sys.argv[:] = ["dgx-music", "worker", *sys.argv[1:]]  # what looks after signals before the slow imports goes by it
    from dgx_music.cli import main

    sys.exit(main())
