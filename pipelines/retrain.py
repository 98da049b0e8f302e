"""The retraining pipeline: convert … gate, and a candidate if the verdict is a pass.

A pipeline's shape is fixed when it is compiled, so it is built for a configuration's stages; the configuration itself
stays a parameter, and may change in all but the number and names of its stages.
"""
# No `from __future__ import annotations` here: kfp reads the annotations as types.

from typing import Any

from kfp import dsl

from components.base.component import base as base_step
from components.convert.component import convert
from components.evaluate.component import evaluate
from components.gate.component import gate
from components.merge.component import merge
from components.predict.component import predict
from components.publish.component import publish
from components.report.component import report
from components.train.component import train_first, train_next
from components.validate.component import validate
from medforge.config import RunConfig

NAME = "medforge-retrain"


def build(config: RunConfig) -> Any:
    """The pipeline for the stages of `config`, with `config` as the parameter's default."""

    stages = [stage.name for stage in config.stages]

    @dsl.pipeline(name=NAME, description="Convert, validate, fine-tune, merge, evaluate, gate and publish.")
    def retrain(config: str = config.to_json()) -> None:
        model = base_step(config=config).set_display_name("base model").outputs["model"]
        raw = convert(config=config).outputs["dataset"]
        data = validate(config=config, dataset=raw, model=model).outputs["clean"]

        adapters = None
        for stage in stages:
            given = {"config": config, "stage": stage, "model": model, "dataset": data}
            task = train_first(**given) if adapters is None else train_next(**given, before=adapters)
            adapters = task.set_display_name(f"train {stage}").outputs["adapters"]

        merged = merge(config=config, model=model, adapters=adapters, dataset=data).outputs["merged"]
        answers = {
            arm: predict(config=config, arm=arm, model=subject, dataset=data)
            .set_display_name(f"predict {arm}")
            .outputs["predictions"]
            for arm, subject in (("base", model), ("tuned", merged))
        }
        scored = evaluate(config=config, **answers, dataset=data).outputs["results"]
        judged = gate(config=config, results=scored)
        verdict = judged.outputs["verdict"]
        page = report(
            config=config, results=scored, **answers, dataset=data, adapters=adapters, verdict=verdict
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
