"""The check that a release may be served."""

from kfp.dsl import Metrics, Output

from components import step


@step()
def approved(release: str, bucket: str, metrics: Output[Metrics]) -> str:
    """Check that a trusted reviewer approved the release (a digest or a channel). Returns its digest, or fails."""
    from medforge.steps.release import approved

    return approved(release, bucket, metrics)
