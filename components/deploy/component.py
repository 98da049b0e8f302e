"""An approved release to a canary on the cluster, and from there to all callers."""

from components import step


@step()
def deploy(release: str, percent: int, namespace: str, name: str, run: str) -> str:
    """Give `percent` of the callers the release. Returns its digest; fails, and removes it, if it is not ready."""
    from medforge.steps.rollout import deploy

    return deploy(release, percent, namespace, name, run)


@step()
def complete(release: str, namespace: str, name: str, run: str, channel: str):  # type: ignore[no-untyped-def]
    """Give the canary's release to all callers, and let the channel name it."""
    from medforge.steps.rollout import complete

    complete(release, namespace, name, run, channel)
