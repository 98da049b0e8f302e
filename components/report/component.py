"""Scores, verdict and cases as one HTML file."""

from kfp.dsl import HTML, Artifact, Dataset, Input, Model, Output

from components import step


@step()
def report(  # type: ignore[no-untyped-def]
    config: str,
    results: Input[Artifact],
    base: Input[Artifact],
    tuned: Input[Artifact],
    dataset: Input[Dataset],
    adapters: Input[Model],
    verdict: Input[Artifact],
    html: Output[HTML],
):
    """Write the report that a reviewer reads."""
    from medforge.steps.evaluation import report

    report(config, results.path, base.path, tuned.path, dataset.path, adapters.path, verdict.path, html.path)
