"""Lines of text are the same however the bytes arrive; what is no text is said to be none."""

import io
import os
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evenflow.media import Line, NotText, lines
from evenflow.media import text as module


def read(path, **options) -> list[Line]:
    return [line for line in lines(path, **options) if line is not None]


class Drip(io.RawIOBase):
    """Bytes that come in pieces of given lengths."""

    def __init__(self, data, sizes):
        self.pieces = []
        for size in sizes:
            self.pieces.append(data[:size])
            data = data[size:]
        self.pieces.append(data)

    def __iter__(self):
        return iter(piece for piece in self.pieces if piece)


TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=("Cs",)), max_size=60)


@given(TEXT, st.lists(st.integers(0, 5), max_size=30))
def test_lines_do_not_depend_on_how_bytes_arrive(text, sizes):
    data = text.encode()
    whole, pieces = [], []
    with pytest.MonkeyPatch.context() as patch:
        for blocks, into in (([data], whole), (list(Drip(data, sizes)), pieces)):
            patch.setattr(module, "_standard_input", lambda blocks=blocks: iter(blocks))
            into += lines("-")
    assert whole == pieces
    assert "".join(line.text for line in whole) == text
    assert [line.number for line in whole] == list(range(1, len(whole) + 1))
    for line in whole:
        assert data[line.offset : line.end].decode() == line.text


def test_offsets_let_one_go_on_in_the_middle(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one\ntwö\r\nthree")
    everything = read(path)
    assert [line.text for line in everything] == ["one\n", "twö\r\n", "three"]
    assert read(path, offset=everything[1].offset, number=2) == everything[1:]
    with pytest.raises(ValueError, match="another file"):
        read(path, offset=100)


def test_a_line_without_end_is_cut_between_characters(tmp_path):
    path = tmp_path / "long.txt"
    text = "é" * 100_000
    path.write_text(text)
    pieces = read(path)
    assert "".join(piece.text for piece in pieces) == text
    assert len(pieces) > 1 and {piece.number for piece in pieces} == {1}
    assert max(len(piece.text.encode()) for piece in pieces) <= module.LONGEST


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"abc\0def\n", "zero byte at offset 3"),
        (b"ok\n\xff\xfe\n", "0xff at offset 3"),
        (b"cut \xe2\x82", "at offset 4"),
    ],
)
def test_what_is_no_text(tmp_path, data, message):
    path = tmp_path / "binary"
    path.write_bytes(data)
    with pytest.raises(NotText, match=message):
        read(path)


def test_what_cannot_be_opened_or_followed(tmp_path):
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "none")
    with pytest.raises(IsADirectoryError):
        read(tmp_path)
    with pytest.raises(ValueError, match="for files"):
        next(lines("-", follow=True))


def test_a_followed_log_is_read_through_growth_truncation_and_rotation(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "POLL", 0.01)
    path, seen = tmp_path / "app.log", []
    path.write_bytes(b"first\nsec")
    ready = threading.Event()

    def reader() -> None:
        for line in lines(path, follow=True):
            if line is not None:
                seen.append(line.text)
            ready.set()
            if line is not None and line.text.startswith("end"):
                return

    def until(text: str) -> None:
        deadline = time.monotonic() + 10
        while text not in seen:
            assert time.monotonic() < deadline, seen
            time.sleep(0.01)

    thread = threading.Thread(target=reader, daemon=True)
    thread.start()
    until("first\n")
    with path.open("ab") as log:
        log.write("ond é".encode()[:-1])
    time.sleep(0.05)
    with path.open("ab") as log:
        log.write("é".encode()[1:] + b"\n")
    until("second é\n")
    path.write_bytes(b"new\n")  # shorter than before: truncated
    until("new\n")
    path.rename(tmp_path / "app.log.1")
    time.sleep(0.03)
    path.write_bytes(b"rotated\n")
    until("rotated\n")
    with path.open("ab") as log:
        log.write(b"end\n")
    thread.join(10)
    assert seen == ["first\n", "second é\n", "new\n", "rotated\n", "end\n"]


def test_a_log_that_was_rotated_while_nobody_looked_is_read_from_its_start(tmp_path):
    path = tmp_path / "app.log"
    path.write_bytes(b"new\n")
    source = lines(path, follow=True, offset=100, number=9)
    assert next(source) == Line("new\n", 1, 0)
    source.close()


def test_standard_input_says_when_there_is_nothing_for_the_moment(monkeypatch):
    out, into = os.pipe()
    with os.fdopen(out) as reader:
        monkeypatch.setattr("sys.stdin", reader)
        source = lines("-")
        assert next(source) is None
        os.write(into, b"a line\nand")
        assert next(source).text == "a line\n"
        assert next(source) is None
        os.write(into, b" another")
        os.close(into)
        assert [line.text for line in source if line] == ["and another"]


def test_a_pipe_with_a_name_is_read_as_it_comes():
    out, into = os.pipe()
    name = f"/dev/fd/{out}"  # what a shell passes for <(command)
    try:
        with pytest.raises(ValueError, match="is a pipe"):
            next(lines(name, follow=True))
        source = lines(name)
        assert next(source) is None
        os.write(into, b"a line\nand")
        assert next(source) == Line("a line\n", 1, 0)
        assert next(source) is None
        os.write(into, b" another")
        os.close(into)
        assert [line for line in source if line] == [Line("and another", 2, 7)]
    finally:
        os.close(out)
