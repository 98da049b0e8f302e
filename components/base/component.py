"""The base model: built, linked, or fetched."""

from kfp.dsl import Model, Output

from components import model_step


@model_step()
def base(config: str, model: Output[Model], seen: str = ""):  # type: ignore[no-untyped-def]
    """Write the base model's folder. `seen` is what tells Kubeflow's cache that the source has changed."""
    from medforge.steps.data import base

    base(config, model.path)
