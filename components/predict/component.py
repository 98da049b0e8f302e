"""A model's answers to the split that is scored."""

from kfp.dsl import Artifact, Dataset, Input, Model, Output

from components import model_step


@model_step()
def predict(  # type: ignore[no-untyped-def]
    config: str, arm: str, model: Input[Model], dataset: Input[Dataset], predictions: Output[Artifact]
):
    """Answer every sample, and measure the likelihood of the reference answers."""
    from medforge.steps.evaluation import predict

    predict(config, arm, model.path, dataset.path, predictions.path)
