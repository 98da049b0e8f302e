"""A candidate to a release in the object store."""

from kfp.dsl import HTML, Artifact, Dataset, Input, Model

from components import step


@step()
def publish(
    config: str,
    model: Input[Model],
    base_model: Input[Model],
    adapters: Input[Model],
    dataset: Input[Dataset],
    tuned: Input[Artifact],
    results: Input[Artifact],
    verdict: Input[Artifact],
    html: Input[HTML],
) -> str:
    """Publish the release, immutable and named by its digest. Returns the digest."""
    from medforge.steps.release import publish

    return publish(
        config,
        model.path,
        base_model.path,
        adapters.path,
        dataset.path,
        tuned.path,
        results.path,
        verdict.path,
        html.path,
    )
