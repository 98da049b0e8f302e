"""One stage of fine-tuning: a longer stack of adapters."""

from kfp.dsl import Artifact, Dataset, Input, Metrics, Model, Output

from components import model_step, step


@model_step()
def train_first(  # type: ignore[no-untyped-def]
    config: str,
    stage: str,
    model: Input[Model],
    dataset: Input[Dataset],
    adapters: Output[Model],
    logs: Output[Artifact],
    metrics: Output[Metrics],
):
    """Train the first stage on the base."""
    from medforge.steps.training import train

    train(config, stage, model.path, dataset.path, "", adapters.path, logs.path, metrics)


@model_step()
def train_next(  # type: ignore[no-untyped-def]
    config: str,
    stage: str,
    model: Input[Model],
    dataset: Input[Dataset],
    before: Input[Model],
    adapters: Output[Model],
    logs: Output[Artifact],
    metrics: Output[Metrics],
):
    """Train a stage on the base and the adapters before it."""
    from medforge.steps.training import train

    train(config, stage, model.path, dataset.path, before.path, adapters.path, logs.path, metrics)


@step()
def train_nodes_first(  # type: ignore[no-untyped-def]
    config: str,
    stage: str,
    nodes: str,
    model: Input[Model],
    dataset: Input[Dataset],
    adapters: Output[Model],
    logs: Output[Artifact],
    metrics: Output[Metrics],
):
    """Train the first stage on the base, on several machines; `nodes` says how their pods are."""
    from medforge.steps.training import train_nodes

    train_nodes(config, stage, nodes, model.path, dataset.path, "", adapters.path, logs.path, metrics)


@step()
def train_nodes_next(  # type: ignore[no-untyped-def]
    config: str,
    stage: str,
    nodes: str,
    model: Input[Model],
    dataset: Input[Dataset],
    before: Input[Model],
    adapters: Output[Model],
    logs: Output[Artifact],
    metrics: Output[Metrics],
):
    """Train a stage on the base and the adapters before it, on several machines; `nodes` says how their pods are."""
    from medforge.steps.training import train_nodes

    train_nodes(config, stage, nodes, model.path, dataset.path, before.path, adapters.path, logs.path, metrics)
