"""Which release a caller is given: sticky, and monotone in the candidate's weight."""

from __future__ import annotations

import hashlib
from typing import Literal

Track = Literal["stable", "candidate"]


def share(caller_id: str) -> float:
    """Where a caller stands in [0, 1): evenly spread over callers, the same in every gateway, for ever."""
    digest = hashlib.sha256(b"medforge-track\0" + caller_id.encode()).digest()
    return (int.from_bytes(digest[:8], "big") >> 11) / (1 << 53)  # 53 bits, which a float holds: never rounded to 1


def track(caller_id: str, candidate_weight: float) -> Track:
    """The candidate for callers below the weight: raising it moves callers only from stable to candidate."""
    return "candidate" if share(caller_id) < candidate_weight else "stable"
