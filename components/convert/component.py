"""Source files to a data set."""

from kfp.dsl import Dataset, Metrics, Output

from components import step


@step()
def convert(config: str, dataset: Output[Dataset], metrics: Output[Metrics]):  # type: ignore[no-untyped-def]
    """Convert the source to a data set."""
    from medforge.steps import convert

    convert(config, dataset.path, metrics)
