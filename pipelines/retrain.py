"""The retraining pipeline: convert … gate, and a candidate if the verdict is a pass.

A pipeline's shape is fixed when it is compiled, so it is built for a configuration's stages; the configuration itself
stays a parameter, and may change in all but the number and names of its stages.
"""
# No `from __future__ import annotations` here: kfp reads the annotations as types.

from typing import Any

from kfp import dsl

from components.base.component import base as base_step
from components.convert.component import convert, convert_join, convert_shard
from components.evaluate.component import evaluate
from components.gate.component import gate
from components.merge.component import merge
from components.predict.component import predict
from components.publish.component import publish
from components.report.component import report
from components.settings.component import settings, settings_stage
from components.sources.component import sources
from components.train.component import train_first, train_next, train_nodes_first, train_nodes_next
from components.validate.component import validate, validate_join, validate_shard
from medforge.config import RunConfig
from pipelines.cluster import ClusterConfig, check_run
from pipelines.nodes import train_nodes
from pipelines.settle import for_cluster

NAME = "medforge-retrain"
ONCE = ("base", "convert", "validate", "merge", "predict", "evaluate", "gate", "report")  # all but train


def build(config: RunConfig, cluster: ClusterConfig | None = None) -> Any:
    """The pipeline for the stages, shards and nodes of `config`, with `config` as the parameter's default.

    With `cluster` it is what runs there; without, what runs on this machine. ValueError for what the place cannot do.
    """
    if cluster is not None:
        check_run(config, cluster)
        return for_cluster(_pipeline(config, cluster), cluster)
    if config.parallel.nodes > 1:
        raise ValueError(f"parallel.nodes: {config.parallel.nodes} machines take a cluster; this is one machine")
    return _pipeline(config, None)


def _pipeline(config: RunConfig, cluster: ClusterConfig | None) -> Any:

    stages = [stage.name for stage in config.stages]
    shards = list(range(config.data.shards))
    nodes = train_nodes(config, cluster) if cluster and config.parallel.nodes > 1 else ""

    @dsl.pipeline(name=NAME, description="Convert, validate, fine-tune, merge, evaluate, gate and publish.")
    def retrain(config: str = config.to_json()) -> None:
        seen, part = _seen(config, cluster), _parts(config, stages, cluster)
        model = base_step(config=part["base"], seen=seen["base"]).set_display_name("base model").outputs["model"]
        raw = _converted(part["convert"], shards, seen["data"])
        data = _validated(part["validate"], shards, raw, model)

        adapters = None
        for stage in stages:
            given = {"config": part[f"train {stage}"], "stage": stage, "model": model, "dataset": data}
            given |= {"nodes": nodes} if nodes else {}
            first, following = (train_nodes_first, train_nodes_next) if nodes else (train_first, train_next)
            task = first(**given) if adapters is None else following(**given, before=adapters)
            adapters = task.set_display_name(f"train {stage}").outputs["adapters"]

        merged = merge(config=part["merge"], model=model, adapters=adapters, dataset=data).outputs["merged"]
        answers = {
            arm: predict(config=part["predict"], arm=arm, model=subject, dataset=data)
            .set_display_name(f"predict {arm}")
            .outputs["predictions"]
            for arm, subject in (("base", model), ("tuned", merged))
        }
        scored = evaluate(config=part["evaluate"], **answers, dataset=data).outputs["results"]
        judged = gate(config=part["gate"], results=scored)
        verdict = judged.outputs["verdict"]
        page = report(
            config=part["report"], results=scored, **answers, dataset=data, adapters=adapters, verdict=verdict
        ).outputs["html"]
        with dsl.If(judged.outputs["Output"] == True, name="passed"):  # noqa: E712  kfp records the comparison
            publish(
                config=config,
                model=merged,
                base_model=model,
                adapters=adapters,
                dataset=data,
                tuned=answers["tuned"],
                results=scored,
                verdict=verdict,
                html=page,
            )

    return retrain


def _seen(config: Any, cluster: ClusterConfig | None) -> dict[str, Any]:
    """What tells the sources' states to Kubeflow's cache; a local run's steps look for themselves."""
    if cluster is None or not cluster.cache:
        return {"data": "", "base": ""}
    return dict(sources(config=config).outputs)


def _parts(config: Any, stages: list[str], cluster: ClusterConfig | None) -> dict[str, Any]:
    """What each step is told of the configuration: its part where a cache looks at it, else the whole."""
    if cluster is None or not cluster.cache:
        return dict.fromkeys([*ONCE, *(f"train {stage}" for stage in stages)], config)
    parts = dict(settings(config=config).outputs)
    for stage in stages:
        task = settings_stage(config=config, stage=stage).set_display_name(f"settings of {stage}")
        parts[f"train {stage}"] = task.output
    return parts


def _converted(config: Any, shards: list[int], seen: Any) -> Any:
    """The data set of the source, whole or of parts that so many tasks read."""
    if len(shards) == 1:
        return convert(config=config, seen=seen).outputs["dataset"]
    with dsl.ParallelFor(items=shards, name="convert shards") as shard:
        part = convert_shard(config=config, shard=shard, seen=seen)
    return convert_join(config=config, parts=dsl.Collected(part.outputs["part"])).outputs["dataset"]


def _validated(config: Any, shards: list[int], raw: Any, model: Any) -> Any:
    """The data set that training can use, checked by one task or by many."""
    if len(shards) == 1:
        return validate(config=config, dataset=raw, model=model).outputs["clean"]
    with dsl.ParallelFor(items=shards, name="validate shards") as shard:
        part = validate_shard(config=config, shard=shard, dataset=raw, model=model)
    checks = dsl.Collected(part.outputs["checks"])
    return validate_join(config=config, dataset=raw, model=model, checks=checks).outputs["clean"]
