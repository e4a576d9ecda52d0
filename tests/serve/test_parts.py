"""The parts of the server one by one: playback, reading, guarding, pictures, and taking turns."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from starlette.datastructures import Headers

from evenflow.serve.limits import Limits
from evenflow.serve.pictures import Drift, decode
from evenflow.serve.playback import Playback
from evenflow.serve.protocol import Refused
from evenflow.serve.reading import QUIET, Reader, spans
from evenflow.serve.security import Guard
from evenflow.serve.viewer import Outbox
from evenflow.serve.worker import Worker

FRAMES = np.zeros((12, 8, 8, 3), np.uint8)


@given(st.floats(0.01, 3.0), st.integers(1, 24), st.floats(0.25, 4.0))
def test_frames_are_shown_once_in_order_and_evenly(service, count, pace):
    """A model that takes `service` seconds for a chunk, driven as the worker does it, in time that is made up."""
    playback, now, dues = Playback(16.0), 0.0, []
    playback.pace = pace
    for _ in range(12):
        now += max(0.0, playback.wait(now))
        began, now = now, now + service
        first = playback.add(FRAMES[:1].repeat(count, 0), began, now, 0.0)
        frame, _ = playback.newest(-1, 1e9)
        assert frame is not None and frame.index == playback.made - 1 and first >= now
        assert len(playback._frames) <= 3 * count + 1
        dues += [f.due for f in playback._frames if f.index >= playback.made - count]
    gaps = np.diff(dues)
    assert (gaps > 0).all()
    usual = max(1 / (16 * pace), service / count)
    assert np.abs(gaps[4 * count :] - usual).max() < 0.1 * usual + 1e-9


def test_a_late_client_gets_the_newest_frame_and_old_ones_are_not_kept():
    playback = Playback(16.0)
    for chunk in range(50):
        playback.add(FRAMES, chunk * 0.75, chunk * 0.75, 0.0)
        assert len(playback._frames) <= 3 * 12
    frame, due = playback.newest(-1, 50 * 0.75 - 0.4)
    assert frame is not None and frame.index == 49 * 12 + 5 and due is not None and due > 50 * 0.75 - 0.4
    assert playback.newest(frame.index, frame.due) == (None, due)


def test_a_pause_does_not_count_as_slowness():
    playback = Playback(16.0)
    playback.add(FRAMES, 0.0, 0.1, 0.0)
    playback.add(FRAMES, 0.8, 0.9, 0.0)
    before = playback.service
    playback.add(FRAMES, 1000.0, 1000.1, 0.0)
    assert abs(playback.service - before) < 0.2 and playback.rate(1000.1) < 1


class Turns:
    """A job that notes when it had its turn."""

    def __init__(self, name, log, worker=None):
        self.name, self.log = name, log

    def wait(self, now):
        return 0.0 if len(self.log) < 30 else None

    def turn(self):
        self.log.append(self.name)
        if self.name == "b" and self.log.count("b") == 2:
            raise ValueError("as asked")

    def failed(self, error):
        self.log.append("failed")


def test_turns_go_round_and_one_that_fails_stops_nobody():
    worker, log = Worker("test"), []
    gate = threading.Event()

    class Gate(Turns):
        def wait(self, now):
            return None if gate.is_set() else 0.0

        def turn(self):
            gate.wait(5)

    worker.add(Gate("gate", []))
    for name in "abc":
        worker.add(Turns(name, log))
    gate.set()
    until = time.monotonic() + 5
    while len(log) < 30 and time.monotonic() < until:
        time.sleep(0.005)
    worker.stop()
    assert log.count("failed") == 1
    turns = [name for name in log if name != "failed"]
    assert turns == [*"abc"] * (len(turns) // 3) + [*"abc"][: len(turns) % 3]


class Letters:
    """A text stream whose tokens are letters: surprise 1, all held but the first 3 are forgotten after 10."""

    class tokenizer:
        bos_token_id = None

        @staticmethod
        def encode(text, add_special_tokens):
            return [ord(letter) for letter in text]

        @staticmethod
        def convert_ids_to_tokens(ids):
            return [chr(i) for i in ids]

        @staticmethod
        def convert_tokens_to_string(tokens):
            return "".join(tokens)

    def __init__(self):
        self.read, self.nbytes, self.state = [], 8, self

    def held(self, layer):
        return [*range(min(3, len(self.read))), *range(max(3, len(self.read) - 7), len(self.read))]

    def surprisal(self, ids):
        first = not self.read
        self.read += ids
        nats = torch.ones(1, len(ids))
        if first:
            nats[0, 0] = torch.nan
        return nats


@given(st.text(alphabet="ab \n", min_size=1, max_size=300), st.lists(st.integers(1, 40), max_size=12))
def test_a_text_is_read_whole_however_it_is_cut(text, cuts):
    stream, told = Letters(), []
    reader = Reader(lambda: stream, told.append, Limits(), lambda: None)
    at = 0
    for cut in [*cuts, 10_000]:
        if text[at : at + cut]:
            reader.append(text[at : at + cut])
        at += cut
        for _ in range(3):
            if reader.wait(0.0) == 0.0:
                reader.turn()
    reader.finish()
    for _ in range(20):
        if reader.wait(0.0) == 0.0:
            reader.turn()
    assert "".join(map(chr, stream.read)) == text
    assert reader.wait(0.0) is None
    assert told[0]["type"] == "read.created" and told[-1]["type"] == "read.finished"
    assert told[-1]["tokens"] == len(text)
    with pytest.raises(Refused, match="finished"):
        reader.append("more")


def settled(reader):
    """Turns until nothing is wanted any more: first what was read is told, a moment later."""
    assert 0 < reader.wait(time.monotonic()) <= QUIET
    time.sleep(QUIET)
    assert reader.wait(time.monotonic()) == 0.0
    reader.turn()
    assert reader.wait(time.monotonic()) is None


def test_all_that_was_read_is_told_though_nothing_more_comes():
    told = []
    reader = Reader(Letters, told.append, Limits(), lambda: None)
    reader.append("one two three ")
    while reader.wait(time.monotonic()) == 0.0:
        reader.turn()
    settled(reader)
    last = [event for event in told if event["type"] == "read.progress"][-1]
    assert last["tokens"] == len("one two three") and "".join(piece for piece, _ in last["pieces"]) == "one two three"


def test_a_word_is_not_cut_where_a_message_ends_and_nothing_spins():
    stream = Letters()
    reader = Reader(lambda: stream, lambda event: None, Limits(text=100), lambda: None)
    reader.append("one tw")
    reader.turn()
    reader.turn()
    assert "".join(map(chr, stream.read)) == "one"
    settled(reader)
    reader.append("o three")
    reader.turn()
    assert "".join(map(chr, stream.read)) == "one two" and reader._waiting == len(" three")
    with pytest.raises(Refused, match="wait to be read"):
        reader.append("x" * 95)


@given(st.lists(st.integers(-1, 60), max_size=40))
def test_spans_are_runs(held):
    runs = spans(held)
    assert [n for first, last in runs for n in range(first, last + 1)] == sorted({n for n in held if n >= 0})
    assert all(later[0] > earlier[1] + 1 for earlier, later in pairwise(runs))


def trouble(host, origin=None, local=True, names=()):
    headers = {"host": host, **({} if origin is None else {"origin": origin})}
    return Guard(None, frozenset(names), local).trouble(Headers(headers))


@pytest.mark.parametrize(
    ("host", "origin", "local"),
    [
        ("127.0.0.1:8484", None, True),
        ("localhost:8484", "http://localhost:8484", True),
        ("localhost:8484", "http://127.0.0.1:8484", True),
        ("[::1]:8484", "http://[::1]:8484", True),
        ("192.168.1.5:8484", "http://192.168.1.5:8484", False),
        ("studio.example", "https://studio.example", False),
        ("studio.example", "http://studio.example", True),
    ],
)
def test_its_own_pages_pass(host, origin, local):
    assert trouble(host, origin, local, ["studio.example"]) is None


@pytest.mark.parametrize(
    ("host", "origin", "local"),
    [
        ("192.168.1.5:8484", None, True),
        ("evil.example", None, False),
        ("127.0.0.1:8484", "http://127.0.0.1:8485", True),
        ("127.0.0.1:8484", "null", True),
        ("127.0.0.1:8484", "file://", True),
        ("192.168.1.5:8484", "http://192.168.1.6:8484", False),
        ("127.0.0.1:99999", None, True),
        ("[::1", None, True),
        ("127.0.0.1/x", None, True),
    ],
)
def test_others_do_not(host, origin, local):
    assert trouble(host, origin, local)


def test_a_picture_is_cut_from_the_middle_and_bombs_are_refused():
    import base64
    import io

    from PIL import Image

    def packed(image, kind="PNG"):
        out = io.BytesIO()
        image.save(out, kind)
        return base64.b64encode(out.getvalue()).decode()

    wide = np.zeros((30, 90, 3), np.uint8)
    wide[:, 30:60] = 255
    assert decode(packed(Image.fromarray(wide)), (16, 16), 4096)[4:12, 4:12].min() > 240
    assert decode(packed(Image.fromarray(wide[:, :, 0])), (8, 24), 4096).shape == (8, 24, 3)
    with pytest.raises(Refused, match="5000"):
        decode(packed(Image.new("L", (5000, 2))), (16, 16), 4096)
    with pytest.raises(Refused, match="no PNG"):
        decode(packed(Image.fromarray(wide), "GIF"), (16, 16), 4096)
    with pytest.raises(Refused, match="no PNG"):
        decode("%%%", (16, 16), 4096)


def test_drift_is_measured_from_the_second_chunk_of_a_scene():
    drift, grey = Drift(), np.full((4, 8, 8, 3), 100, np.uint8)
    assert [drift.of(grey), drift.of(grey + 50), drift.of(grey + 50)] == [0, 0, 0]
    assert drift.of(grey) == pytest.approx(50 / 255 / 2**0.5, rel=1e-5)
    drift.anew()
    assert [drift.of(grey), drift.of(grey), drift.of(grey)] == [0, 0, 0]


def test_an_answer_never_overtakes_the_figures_that_came_before_it():
    sent = []

    class Socket:
        async def send_text(self, text):
            sent.append(json.loads(text))

    async def send():
        outbox = Outbox(Socket(), Limits())
        for n in range(3):
            outbox._put({"type": "read.progress", "tokens": n, "pieces": [[f"word {n}", 1.0]]})
        outbox._put({"type": "read.finished", "tokens": 2})
        outbox.over = True
        await outbox.run()

    asyncio.run(send())
    assert [event["type"] for event in sent] == ["read.progress", "read.finished"]
    assert sent[0]["tokens"] == 2 and [piece for piece, _ in sent[0]["pieces"]] == ["word 0", "word 1", "word 2"]
