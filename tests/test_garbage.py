"""The search for garbage of a process that runs for long."""

import subprocess
import sys

PROGRAM = """
import gc
from dgx_music.garbage import spare_collections
here = [[] for _ in range(1_000)]
spare_collections()
searched = {id(each) for each in gc.get_objects()}
print(sum(id(each) in searched for each in here))
"""


def test_what_is_there_at_the_start_is_not_searched_again():
    done = subprocess.run([sys.executable, "-c", PROGRAM], check=True, capture_output=True)
    assert done.stdout == b"0\n"
