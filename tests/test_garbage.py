"""The search for garbage of a process that runs for long."""

import gc

from dgx_music.garbage import spare_collections


def test_what_is_there_at_the_start_is_not_searched_again():
    here = [[] for _ in range(1_000)]
    spare_collections()
    searched = {id(each) for each in gc.get_objects()}
    assert not any(id(each) in searched for each in here)
