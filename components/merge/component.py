"""The base and its adapters to one model."""

from kfp.dsl import Dataset, Input, Metrics, Model, Output

from components import model_step


@model_step()
def merge(  # type: ignore[no-untyped-def]
    config: str,
    model: Input[Model],
    adapters: Input[Model],
    dataset: Input[Dataset],
    merged: Output[Model],
    metrics: Output[Metrics],
):
    """Merge all adapters and prove that the merged model says the same."""
    from medforge.steps.training import merge

    merge(config, model.path, adapters.path, dataset.path, merged.path, metrics)
