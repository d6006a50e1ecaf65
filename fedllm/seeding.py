"""Counter-based seeds: every random choice depends on what it is for, never on what ran before it."""

from __future__ import annotations

import hashlib


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed from the parts, the same on every machine.

    Args:
        parts: what the randomness is for, for example ``(run seed, round, client name, "batches")``.
    """
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) >> 1
