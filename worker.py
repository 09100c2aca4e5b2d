"""The worker daemon, like ``dgx-music worker``: ``python worker.py --help`` lists its options."""

import sys

if __name__ == "__main__":
    # The handlers of early signals read the command from here, before the slow imports.
    sys.argv[:] = ["dgx-music", "worker", *sys.argv[1:]]
    from dgx_music.cli import main

    sys.exit(main())
