"""The six-field cron expressions of Kubeflow Pipelines: seconds first, as robfig/cron v1 reads them.

Its scheduler computes in UTC, unless the operator of Kubeflow gave its controller CRON_SCHEDULE_TIMEZONE; a zone in the
expression (CRON_TZ=…) is not understood. The server takes five fields too, and reads them from the seconds on.
https://pkg.go.dev/github.com/robfig/cron@v1.2.0
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import date, datetime, timedelta, timezone
from itertools import islice

_MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
_DAYS = ("sun", "mon", "tue", "wed", "thu", "fri", "sat")
_FIELDS: tuple[tuple[str, int, int, tuple[str, ...]], ...] = (
    ("second", 0, 59, ()),
    ("minute", 0, 59, ()),
    ("hour", 0, 23, ()),
    ("day of month", 1, 31, ()),
    ("month", 1, 12, _MONTHS),
    ("day of week", 0, 6, _DAYS),
)
_YEARS = 8  # 29 February comes within eight years, over the turn of a century too


@dataclass(frozen=True)
class Cron:
    """A checked expression: the values of each field, and whether the two fields of days are stars."""

    text: str
    values: tuple[frozenset[int], ...]
    any_day: tuple[bool, bool]

    def after(self, moment: datetime) -> Iterator[datetime]:
        """The times that it names after `moment`, in UTC; it ends when none comes within eight years."""
        moment = moment.astimezone(timezone.utc)
        seconds, minutes, hours = (sorted(self.values[place]) for place in range(3))
        for ahead in range(366 * _YEARS):
            day = moment.date() + timedelta(days=ahead)
            if not self._on(day):
                continue
            for hour in hours:
                for minute in minutes:
                    for second in seconds:
                        time = datetime(day.year, day.month, day.day, hour, minute, second, tzinfo=timezone.utc)
                        if time > moment:
                            yield time

    def _on(self, day: date) -> bool:
        """Both fields of days must fit if one is a star, else either: so it is with every cron."""
        of_month = day.day in self.values[3]
        of_week = day.isoweekday() % 7 in self.values[5]
        both = of_month and of_week if any(self.any_day) else of_month or of_week
        return day.month in self.values[4] and both

    def next(self, moment: datetime, count: int = 1) -> list[datetime]:
        """The next `count` times after `moment`."""
        return list(islice(self.after(moment), count))


def parse(text: str, now: datetime) -> Cron:
    """The expression, each field checked. ValueError names the field and says the mend."""
    words = text.split()
    if words and words[0].startswith(("CRON_TZ=", "TZ=")):
        raise ValueError(
            f"cron {text!r}: a zone cannot be given here; Kubeflow reads the fields in UTC (or in the zone of its "
            "controller's CRON_SCHEDULE_TIMEZONE): turn the hours into UTC and leave it out"
        )
    if len(words) == 1 and text.strip().startswith("@"):
        raise ValueError(f'cron {text!r}: six fields are needed, such as "0 0 2 * * *" for 02:00 each day')
    if len(words) == 5:
        raise ValueError(_five(text, words, now))
    if len(words) != 6:
        raise ValueError(
            f"cron {text!r}: has {len(words)} fields; six are needed: second minute hour day-of-month month day-of-week"
        )
    cron = _parse(text, words)
    if not cron.next(now):
        raise ValueError(f"cron {text!r}: names no day that comes; such as 31 in a month of 30 days")
    return cron


def _parse(text: str, words: list[str]) -> Cron:
    fields = [_field(text, word, *field) for word, field in zip(words, _FIELDS, strict=True)]
    return Cron(" ".join(words), tuple(values for values, _ in fields), (fields[3][1], fields[5][1]))


def _five(text: str, words: list[str], now: datetime) -> str:
    message = f"cron {text!r}: has five fields; six are needed, seconds first: "
    try:
        meant = _parse(text, ["0", *words])
        read = _parse(text, [*words, "*"])  # what the server would have made of it
    except ValueError:
        return message + "second minute hour day-of-month month day-of-week"
    wanted = meant.next(now)
    times = read.next(now, 2)
    every = f", then {times[1]:%Y-%m-%d %H:%M:%S}" if len(times) == 2 else ""
    would = f"at {times[0]:%Y-%m-%d %H:%M:%S}{every}" if times else "never"
    mend = f' "0 {" ".join(words)}" means {wanted[0]:%Y-%m-%d %H:%M:%S}.' if wanted else ""
    return f"{message}Kubeflow would have read it from the seconds on and run {would} (UTC).{mend}"


def _field(text: str, word: str, name: str, low: int, high: int, names: Sequence[str]) -> tuple[frozenset[int], bool]:
    """The values that a field names, and whether it is a star."""
    values: set[int] = set()
    star = False

    def wrong(why: str) -> ValueError:
        return ValueError(f"cron {text!r}: {name} {word!r}: {why}")

    def number(part: str) -> int:
        if part.lower() in names:
            return low + names.index(part.lower())
        if not (part.isascii() and part.isdigit()):
            known = f", or {names[0]} to {names[-1]}" if names else ""
            raise wrong(f"{part!r} is no number from {low} to {high}{known}")
        if not low <= int(part) <= high:
            raise wrong(f"{part} is not within {low} to {high}")
        return int(part)

    for part in word.split(","):
        span, slash, step = part.partition("/")
        if span in ("*", "?"):
            star, first, last = True, low, high
        else:
            begin, dash, end = span.partition("-")
            first = number(begin)
            last = number(end) if dash else (high if slash else first)
        if first > last:
            raise wrong(f"{span} ends before it begins")
        if slash and not (step.isascii() and step.isdigit() and int(step) > 0):
            raise wrong(f"the step {step!r} is no number above 0")
        values |= set(range(first, last + 1, int(step) if slash else 1))
    return frozenset(values), star
