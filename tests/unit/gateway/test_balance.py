"""The canary's split: sticky, even, monotone."""

from __future__ import annotations

import hashlib

from hypothesis import given
from hypothesis import strategies as st

from serving.gateway.balance import share, track

CALLERS = [f"key-{number}" for number in range(20_000)]


def test_a_callers_place_is_that_of_its_hash() -> None:
    digest = hashlib.sha256(b"medforge-track\0key-7").hexdigest()
    assert abs(share("key-7") - int(digest[:16], 16) / 16**16) < 1e-15


def test_callers_are_spread_as_the_weight_says() -> None:
    for weight in (0.05, 0.3, 0.9):
        got = sum(track(caller, weight) == "candidate" for caller in CALLERS) / len(CALLERS)
        # five standard deviations of a binomial share
        assert abs(got - weight) < 5 * (weight * (1 - weight) / len(CALLERS)) ** 0.5


def test_the_ends_are_exact() -> None:
    assert {track(caller, 0.0) for caller in CALLERS} == {"stable"}
    assert {track(caller, 1.0) for caller in CALLERS} == {"candidate"}


@given(st.text(), st.floats(0, 1), st.floats(0, 1))
def test_raising_the_weight_never_takes_the_candidate_away(caller: str, one: float, other: float) -> None:
    low, high = sorted((one, other))
    assert 0 <= share(caller) < 1
    if track(caller, low) == "candidate":
        assert track(caller, high) == "candidate"
