"""Random numbers that depend on a key alone, so that a fork, a replay or a resumed session draws the same."""

from __future__ import annotations

import hashlib
import struct

import torch


def keyed(seed: int, *key: int) -> torch.Generator:
    """A generator on the CPU, seeded by the BLAKE2 hash of integers of 64 bits; the same on every machine."""
    packed = struct.pack(f"<{len(key) + 1}q", seed, *key)
    return torch.Generator().manual_seed(int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest(), "little"))
