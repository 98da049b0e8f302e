"""A canary under watch."""

from kfp.dsl import Metrics, Output

from components import step


@step()
def watch(  # type: ignore[no-untyped-def]
    namespace: str, name: str, run: str, minutes: float, requests: int, metrics: Output[Metrics]
):
    """Watch the alerts of Prometheus for so long, until so many requests came; roll back and fail when one fires."""
    from medforge.steps.rollout import watch

    watch(namespace, name, run, minutes, requests, metrics)
