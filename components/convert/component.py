"""Source files to a data set."""

from kfp.dsl import Dataset, Input, Metrics, Output

from components import step


@step()
def convert(  # type: ignore[no-untyped-def]
    config: str, dataset: Output[Dataset], metrics: Output[Metrics], seen: str = ""
):
    """Convert the source to a data set. `seen` is what tells Kubeflow's cache that the source has changed."""
    from medforge.steps.data import convert

    convert(config, dataset.path, metrics)


@step()
def convert_shard(  # type: ignore[no-untyped-def]
    config: str, shard: int, part: Output[Dataset], seen: str = ""
):
    """Read one shard of the source; `seen` as for the whole."""
    from medforge.steps.data import convert_shard

    convert_shard(config, shard, part.path)


@step()
def convert_join(  # type: ignore[no-untyped-def]
    config: str, parts: Input[list[Dataset]], dataset: Output[Dataset], metrics: Output[Metrics]
):
    """Make one data set of all shards."""
    from medforge.steps.data import convert_join

    convert_join(config, [part.path for part in parts], dataset.path, metrics)
