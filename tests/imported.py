"""What the process has imported that others are forks of: see ``tests/forks.py``."""

import gc

import aiosqlite  # noqa: F401
import asyncpg  # noqa: F401
import psycopg  # noqa: F401
import pyloudnorm  # noqa: F401

import dgx_music.cli.worker
import dgx_music.worker.daemon  # noqa: F401
import tests.mortal  # noqa: F401

# a fork that looks for garbage would copy all of this
gc.freeze()
