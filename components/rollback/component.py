"""The end of a release pipeline that failed."""

from kfp.dsl import PipelineTaskFinalStatus

from components import step


@step()
def rollback(  # type: ignore[no-untyped-def]
    canary: int, namespace: str, name: str, run: str, channel: str, status: PipelineTaskFinalStatus
):
    """Remove the canary of this run if the run failed; without one there is nothing to do."""
    from medforge.steps.rollout import rollback

    rollback(canary, status.state, namespace, name, run, channel)
