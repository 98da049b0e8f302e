"""Scores to a verdict."""

from kfp.dsl import Artifact, Input, Metrics, Output

from components import step


@step()
def gate(config: str, results: Input[Artifact], verdict: Output[Artifact], metrics: Output[Metrics]) -> bool:
    """Judge the scores by the policy. The pipeline goes on to publish only where this returns true."""
    from medforge.steps.evaluation import gate

    return gate(config, results.path, verdict.path, metrics)
