"""Six-field cron, by hand-worked times."""

from __future__ import annotations

from datetime import datetime, timezone

import pytest

from pipelines.cron import parse

NOW = datetime(2026, 11, 21, 12, 30, 5, tzinfo=timezone.utc)  # a Saturday


@pytest.mark.parametrize(
    ("text", "times"),
    [
        ("0 0 2 * * *", ["2026-11-22 02:00:00", "2026-11-23 02:00:00"]),
        ("30 */15 * * * *", ["2026-11-21 12:30:30", "2026-11-21 12:45:30"]),
        ("0 0 2 ? * MON-FRI", ["2026-11-23 02:00:00", "2026-11-24 02:00:00"]),
        ("0 0 2 1,15 * *", ["2026-12-01 02:00:00", "2026-12-15 02:00:00"]),
        ("0 0 0 13 * fri", ["2026-11-27 00:00:00", "2026-12-04 00:00:00"]),  # both days are said: either will do
        ("0 0 0 29 feb ?", ["2028-02-29 00:00:00", "2032-02-29 00:00:00"]),
        ("5 30 12 * * *", ["2026-11-22 12:30:05", "2026-11-23 12:30:05"]),  # now itself is past
        ("0 10/20 3 * * 0", ["2026-11-22 03:10:00", "2026-11-22 03:30:00"]),
    ],
)
def test_the_next_times(text: str, times: list[str]) -> None:
    assert [f"{time:%Y-%m-%d %H:%M:%S}" for time in parse(text, NOW).next(NOW, 2)] == times


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("60 0 2 * * *", "second '60': 60 is not within 0 to 59"),
        ("0 60 2 * * *", "minute '60': 60 is not within 0 to 59"),
        ("0 0 24 * * *", "hour '24': 24 is not within 0 to 23"),
        ("0 0 2 0 * *", "day of month '0': 0 is not within 1 to 31"),
        ("0 0 2 * 13 *", "month '13': 13 is not within 1 to 12"),
        ("0 0 2 * * 7", "day of week '7': 7 is not within 0 to 6"),
        ("0 0 2 * * noday", "day of week 'noday': 'noday' is no number from 0 to 6, or sun to sat"),
        ("0 0 5-2 * * *", "hour '5-2': 5-2 ends before it begins"),
        ("0 */0 2 * * *", r"minute '\*/0': the step '0' is no number above 0"),
        ("0 0 2 , * *", "day of month ',': '' is no number"),
        ("0 0 2 31 2 ?", "names no day that comes"),
        ("0 0 2 * *  * *", "has 7 fields; six are needed"),
        ("", "has 0 fields; six are needed"),
        ("@daily", "six fields are needed"),
        ("CRON_TZ=Europe/Paris 0 0 2 * * *", "a zone cannot be given here"),
    ],
)
def test_a_mistake_names_the_field(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(text, NOW)


def test_five_fields_are_told_what_they_would_have_done() -> None:
    with pytest.raises(ValueError) as error:
        parse("0 2 * * *", NOW)  # meant: daily at two; read: at two minutes past each hour
    assert str(error.value) == (
        "cron '0 2 * * *': has five fields; six are needed, seconds first: Kubeflow would have read it from the "
        "seconds on and run at 2026-11-21 13:02:00, then 2026-11-21 14:02:00 (UTC). "
        '"0 0 2 * * *" means 2026-11-22 02:00:00.'
    )
