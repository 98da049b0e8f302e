"""Predictions to scores."""

from kfp.dsl import Artifact, Dataset, Input, Metrics, Output

from components import step


@step()
def evaluate(  # type: ignore[no-untyped-def]
    config: str,
    base: Input[Artifact],
    tuned: Input[Artifact],
    dataset: Input[Dataset],
    results: Output[Artifact],
    metrics: Output[Metrics],
):
    """Score both arms on the same samples and compare them."""
    from medforge.steps.evaluation import evaluate

    evaluate(config, base.path, tuned.path, dataset.path, results.path, metrics)
