"""An approved release to the one that a channel names."""

from components import step


@step()
def promote(release: str, bucket: str, channel: str) -> str:
    """Let the channel name the release, whose approval is checked again. Returns the digest that it named before."""
    from medforge.steps.release import promote

    return promote(release, bucket, channel)
