"""What the sources of a run are just now, so that steps that read them are reused only while they stay the same."""

from typing import NamedTuple

from components import step


@step()
def sources(config: str) -> NamedTuple("Seen", [("data", str), ("base", str)]):  # type: ignore[valid-type]
    """Tell the state of the data's and the base model's source."""
    from medforge.steps.data import sources

    return sources(config)
