"""A run's configuration to what each step reads of it: a change misses Kubeflow's cache only where it matters."""

from typing import NamedTuple

from components import step


@step()
def settings(
    config: str,
) -> NamedTuple(  # type: ignore[valid-type]
    "Parts",
    [
        ("base", str),
        ("convert", str),
        ("validate", str),
        ("merge", str),
        ("predict", str),
        ("evaluate", str),
        ("gate", str),
        ("report", str),
    ],
):
    """Tell the part of each step that there is once."""
    from medforge.steps.settings import part

    names = ("base", "convert", "validate", "merge", "predict", "evaluate", "gate", "report")
    return tuple(part(config, name) for name in names)


@step()
def settings_stage(config: str, stage: str) -> str:
    """Tell the part of a stage's training."""
    from medforge.steps.settings import part

    return part(config, "train", stage)
