"""The base model: built, linked, or fetched."""

from kfp.dsl import Model, Output

from components import step


@step()
def base(config: str, model: Output[Model]):  # type: ignore[no-untyped-def]
    """Write the base model's folder."""
    from medforge.steps import base

    base(config, model.path)
