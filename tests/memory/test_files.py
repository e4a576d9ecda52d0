"""A state file is whole or refused: every flipped byte, every truncation, a kill in the middle of saving."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from evenflow.memory import StateError, read_state, write_state


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "session.evenflow"
    write_state(path, {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2, dtype=torch.bfloat16)}, {"turn": 3})
    return path


def test_round_trip(saved):
    tensors, meta = read_state(saved)
    assert meta == {"turn": 3}
    assert torch.equal(tensors["a"], torch.arange(6.0).reshape(2, 3)) and tensors["b"].dtype is torch.bfloat16
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


def test_every_flipped_byte_is_noticed(saved):
    good = saved.read_bytes()
    for at in range(len(good)):
        bad = bytearray(good)
        bad[at] ^= 1 << at % 8
        saved.write_bytes(bad)
        with pytest.raises(StateError):
            read_state(saved)


def test_every_truncation_is_noticed(saved):
    good = saved.read_bytes()
    for length in range(len(good)):
        saved.write_bytes(good[:length])
        with pytest.raises(StateError):
            read_state(saved)
    saved.write_bytes(good + b"\0")
    with pytest.raises(StateError, match="checksum"):
        read_state(saved)


def test_missing_files_and_folders(tmp_path):
    with pytest.raises(StateError, match=r"cannot read .*No such file"):
        read_state(tmp_path / "none")
    with pytest.raises(StateError, match=r"cannot write .*No such file"):
        write_state(tmp_path / "none" / "x", {}, {})
    (tmp_path / "folder").mkdir()
    with pytest.raises(StateError, match="previous file, if any, is untouched"):
        write_state(tmp_path / "folder", {}, {})
    assert not list(tmp_path.glob(".*.tmp"))


WRITER = """
import sys, torch
from evenflow.memory import write_state
path, tensors = sys.argv[1], {"x": torch.zeros(2_000_000)}
turn = 0
while True:
    tensors["x"].fill_(turn)
    write_state(path, tensors, {"turn": turn})
    print(turn, flush=True)
    turn += 1
"""


def test_a_kill_while_saving_leaves_a_readable_state(tmp_path):
    path = tmp_path / "state"
    for delay in (0.0, 0.003, 0.007, 0.012, 0.02):
        writer = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, env=os.environ)
        assert writer.stdout is not None
        writer.stdout.readline()
        time.sleep(delay)
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        writer.stdout.close()
        tensors, meta = read_state(path)
        assert (tensors["x"] == meta["turn"]).all()
