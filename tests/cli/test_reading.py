"""What is counted while reading, without a process around it."""

import math
import signal
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

from evenflow.cli.reading import POINT, POINTS, Reading, Track
from evenflow.cli.showing import amount, number, perplexity, seen, summary
from evenflow.cli.writing import Speller
from evenflow.media import Line
from evenflow.memory import Memory


class Predictor:
    """A stream whose surprisal of token n is n / 10, and unknown for the first."""

    def __init__(self, memory):
        self.memory, self.nbytes, self.read = memory, 1000, []

    def surprisal(self, ids):
        nats = torch.tensor([[token / 10 for token in ids]])
        if not self.read:
            nats[0, 0] = torch.nan
        self.read += ids
        return nats


def text(*lines):
    offset, out = 0, []
    for n, line in enumerate(lines):
        out.append(Line(line, n + 1, offset))
        offset += len(line)
    return out


def encode(line):
    return [ord(c) - 96 for c in line.strip()]


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_sums_lines_and_places(chunk):
    track = Track("one", Predictor(Memory(window=3)))
    reading = Reading([track], encode, chunk, odd=1)
    for _ in reading.run([*text("abc\n", "zzzz\n", "ab"), None], None, None):
        pass
    assert (track.tokens, track.counted) == (9, 8)
    assert math.isclose(track.nats, (2 + 3 + 4 * 26 + 1 + 2) / 10, rel_tol=1e-6)
    (odd,) = reading.odd
    assert (odd.number, odd.offset, odd.position, odd.text) == (2, 4, 3, "zzzz")
    assert math.isclose(odd.nats, 2.6, rel_tol=1e-6)
    assert (reading.offset, reading.number) == (11, 3)


def test_limit_ends_after_a_line_and_patience_stops_one_memory():
    tracks = [Track("one", Predictor(Memory(window=3))), Track("two", Predictor(Memory()))]
    reading = Reading(tracks, encode, 2)
    tracks[1].seconds = 100.0
    for _ in reading.run(text("abc\n", "def\n", "ghi\n"), 4, 50.0):
        pass
    assert tracks[0].tokens == 6 and tracks[0].stopped is None
    assert tracks[1].stopped and "stopped at" in tracks[1].stopped
    assert reading.number == 3


def test_notes_go_on_counting():
    track = Track("one", Predictor(Memory(window=3)))
    reading = Reading([track], encode, 2)
    list(reading.run(text("abc\n"), None, None))
    later = Reading([Track("one", Predictor(Memory(window=3)))], encode, 2)
    later.recall(reading.notes())
    assert later.tracks[0].tokens == 3 and later.offset == 4 and later.number == 2


def test_ctrl_c_never_parts_what_was_read_from_what_is_known_of_it():
    track = Track("one", Predictor(Memory(window=3)))

    def interrupt(ids, surprisal=track.stream.surprisal):
        nats = surprisal(ids)
        signal.raise_signal(signal.SIGINT)
        return nats

    track.stream.surprisal = interrupt
    reading = Reading([track], encode, 2)
    with pytest.raises(KeyboardInterrupt):
        list(reading.run(text("abcdefg\n", "hi\n"), None, None))
    assert len(track.stream.read) == track.tokens == reading.tokens == 7
    assert (reading.offset, reading.number) == (8, 2)


def test_a_curve_without_end_has_points_with_an_end():
    track = Track("one", Predictor(Memory(window=3)))
    track.mark()
    for _ in range(3 * POINTS):
        track.read([1] * POINT)
    track.finish()
    positions = [point.position for point in track.curve]
    assert len(positions) <= POINTS and positions[0] == 0 and positions[-1] == track.tokens
    assert {b - a for a, b in pairwise(positions)} == {4 * POINT}


def test_the_two_sentences_say_what_the_figures_say():
    tracks = [Track("small", Predictor(Memory(window=3))), Track("big", Predictor(Memory()))]
    reading = Reading(tracks, encode, 700)
    list(reading.run(text(*["abcdefg\n"] * 600), None, None))
    cost, quality = seen(tracks)
    assert "small held 1.0 kB" in cost and "big held" in cost
    assert "predicted best" in quality and number(summary(tracks[0])["perplexity"]) in quality


@pytest.mark.parametrize(
    ("value", "shown"), [(math.nan, "–"), (math.inf, "inf"), (0.14849, "0.1485"), (1234.5, "1,234"), (107.64, "107.6")]
)
def test_numbers_for_people(value, shown):
    assert number(value) == shown


def test_amounts_and_overflow():
    assert [amount(n) for n in (5, 1500, 67.2e6, 5e12)] == ["5 B", "1.5 kB", "67.2 MB", "5000.0 GB"]
    assert perplexity(1e9) == math.inf


def test_characters_appear_when_they_are_whole():
    tokenizer = SimpleNamespace(decode=lambda ids: bytes(ids).decode(errors="replace"))
    speller = Speller(tokenizer)
    shown = [speller.add(byte) for byte in "aé😀b".encode()]
    assert shown == ["a", "", "é", "", "", "", "😀", "b"]
    assert speller.rest() == ""
    speller.add("é".encode()[0])
    assert speller.rest() == "\ufffd"
