"""A data set to its samples that training can use."""

from kfp.dsl import Dataset, Input, Metrics, Model, Output

from components import step


@step()
def validate(  # type: ignore[no-untyped-def]
    config: str, dataset: Input[Dataset], model: Input[Model], clean: Output[Dataset], metrics: Output[Metrics]
):
    """Try every sample on the model's processor; keep the sound ones, and the reasons of the others."""
    from medforge.steps import validate

    validate(config, dataset.path, model.path, clean.path, metrics)
