"""Claims of the video model that take long: what they run on can be opened at all."""

import pytest

from evenflow.api import video
from evenflow.claims.video import MEMORIES


@pytest.mark.parametrize("memory", MEMORIES)
def test_every_memory_that_is_compared_plays_on_the_shipped_model(memory):
    stream = video("tiny", "a large red circle rests over the sea by day", memory=memory)
    assert len(stream.step().frames) and stream.nbytes
