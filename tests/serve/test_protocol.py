"""Events and frames: what is read is what was written, and nothing else is read."""

from __future__ import annotations

import json
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evenflow.serve.limits import Bucket
from evenflow.serve.protocol import FORMATS, FrameHeader, Refused, pack_frame, read_event, unpack_frame


def event(**values):
    return read_event(json.dumps(values))


@given(
    st.builds(
        FrameHeader,
        frame=st.integers(0, 2**64 - 1),
        captured=st.floats(0, 4e9),
        chunk=st.integers(0, 2**32 - 1),
        width=st.integers(1, 2**16 - 1),
        height=st.integers(1, 2**16 - 1),
        format=st.sampled_from(FORMATS),
    ),
    st.binary(max_size=64),
)
def test_a_frame_comes_back_as_it_was(header, body):
    assert unpack_frame(pack_frame(header, body)) == (header, body)


def test_the_header_is_at_fixed_places():
    message = pack_frame(FrameHeader(7, 1.5, 3, 64, 48, "jpeg"), b"picture")
    assert message[:4] == b"EVNF" and message[4:6] == bytes([1, 1])
    assert struct.unpack_from("<HH", message, 6) == (64, 48)
    assert struct.unpack_from("<IQd", message, 12) == (3, 7, 1.5)
    assert message[32:] == b"picture"


@pytest.mark.parametrize(
    "message", [b"", b"EVNF", b"NOPE" + bytes(40), b"EVNF\x09" + bytes(40), b"EVNF\x01\x09" + bytes(40)]
)
def test_what_is_no_frame_is_refused(message):
    with pytest.raises(ValueError):
        unpack_frame(message)


@given(st.text(max_size=200))
def test_no_text_does_more_than_be_refused(text):
    for reading in (False, True):
        with pytest.raises(Refused) as refused:
            read_event(text, reading=reading)
        assert refused.value.event("x")["event_id"] == "x"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
TYPES = ["session.create", "session.update", "session.resume", "input.append", "history.replay", "frame.ack"]


@given(
    st.sampled_from(TYPES),
    st.dictionaries(st.sampled_from(["item", "memory", "seed", "session", "history", "frame"]), json_values),
)
def test_odd_values_are_refused_or_read(kind, values):
    try:
        assert read_event(json.dumps({**values, "type": kind})).type == kind
    except Refused as refused:
        assert refused.code == "bad_event" and refused.message


@pytest.mark.parametrize(
    ("item", "part"),
    [
        ({"type": "prompt", "text": "x" * 2001}, "2000"),
        ({"type": "prompt", "text": ""}, "1 character"),
        ({"type": "prompt", "text": "a", "how": "loudly"}, "how"),
        ({"type": "prompt", "text": "a", "over": -1}, "over"),
        ({"type": "prompt", "text": "a", "over": float("inf")}, "over"),
        ({"type": "prompt", "text": "a", "colour": 3}, "colour"),
        ({"type": "blend", "weights": {}}, "weights"),
        ({"type": "blend", "weights": {"a": 0, "b": 0}}, "weights"),
        ({"type": "blend", "weights": {"a": -1}}, "weights"),
        ({"type": "track", "points": []}, "points"),
        ({"type": "track", "points": [[0, 1, 1]] * 513}, "points"),
        ({"type": "track", "points": [[1, 1, 1], [0, 2, 2]]}, "go back"),
        ({"type": "track", "points": [[0, float("nan"), 1]]}, "points"),
        ({"type": "erase", "id": "../../etc"}, "id"),
        ({"type": "sound"}, "sound"),
    ],
)
def test_a_wrong_item_is_refused_with_the_place(item, part):
    with pytest.raises(Refused, match=part):
        event(type="input.append", item=item)


@pytest.mark.parametrize("identity", ["", "short", "../../../../../etc/pas", "a" * 23, "a" * 21 + "/", "a" * 21 + "\n"])
def test_an_identity_is_no_path(identity):
    with pytest.raises(Refused):
        event(type="session.resume", session=identity)


def test_a_blend_is_read_in_order():
    read = event(
        type="input.append", item={"type": "blend", "weights": {"b": 0.3, "a": 0.7}, "way": "slerp"}, event_id="7"
    )
    assert list(read.item.weights.items()) == [("b", 0.3), ("a", 0.7)] and read.event_id == "7"


def test_a_timeline_is_in_order():
    entries = [{"at": 6, "item": {"type": "prompt", "text": "b"}}, {"at": 3, "item": {"type": "prompt", "text": "c"}}]
    with pytest.raises(Refused, match="in order"):
        event(
            type="history.replay",
            history={"prompt": "a", "seed": 0, "memory": "m", "schedule": "s", "entries": entries},
        )


def test_a_long_message_is_refused():
    with pytest.raises(Refused, match="262,144"):
        read_event("x" * (256 * 1024 + 1))
    with pytest.raises(Refused, match="262,144"):
        read_event("é" * (128 * 1024 + 1))
    with pytest.raises(Refused):
        read_event("[" * 200_000)


def test_a_bucket_lets_through_its_rate():
    now = 0.0
    bucket = Bucket(2.0, 5.0, lambda: now)
    assert [bucket.take() for _ in range(7)] == [True] * 5 + [False] * 2
    now = 1.0
    assert [bucket.take() for _ in range(3)] == [True, True, False]
    now = 100.0
    assert not bucket.take(6) and bucket.take(5)


@given(st.lists(st.tuples(st.floats(0, 2), st.floats(0.1, 3)), max_size=40))
def test_a_bucket_never_gives_more_than_rate_and_burst(steps):
    now, given_out = 0.0, 0.0
    bucket = Bucket(2.0, 3.0, lambda: now)
    for wait, amount in steps:
        now += wait
        if bucket.take(amount):
            given_out += amount
        assert given_out <= 3.0 + 2.0 * now + 1e-9
