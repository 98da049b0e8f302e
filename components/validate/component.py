"""A data set to its samples that training can use."""

from kfp.dsl import Artifact, Dataset, Input, Metrics, Model, Output

from components import model_step


@model_step()
def validate(  # type: ignore[no-untyped-def]
    config: str, dataset: Input[Dataset], model: Input[Model], clean: Output[Dataset], metrics: Output[Metrics]
):
    """Try every sample on the model's processor; keep the sound ones, and the reasons of the others."""
    from medforge.steps.data import validate

    validate(config, dataset.path, model.path, clean.path, metrics)


@model_step()
def validate_shard(  # type: ignore[no-untyped-def]
    config: str, shard: int, dataset: Input[Dataset], model: Input[Model], checks: Output[Artifact]
):
    """Try the samples of one shard."""
    from medforge.steps.data import validate_shard

    validate_shard(config, shard, dataset.path, model.path, checks.path)


@model_step()
def validate_join(  # type: ignore[no-untyped-def]
    config: str,
    dataset: Input[Dataset],
    model: Input[Model],
    checks: Input[list[Artifact]],
    clean: Output[Dataset],
    metrics: Output[Metrics],
):
    """Judge the samples by what all shards found."""
    from medforge.steps.data import validate

    validate(config, dataset.path, model.path, clean.path, metrics, [check.path for check in checks])
