"""`medforge models tiny|import`, `medforge train` and `medforge merge`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add(commands: Any) -> None:
    """Declare `models`, `train` and `merge`."""
    models = commands.add_parser("models", help="build the tiny model, or fetch a base model").add_subparsers(
        dest="action", required=True, metavar="ACTION"
    )
    tiny = models.add_parser("tiny", help="build and pre-train a tiny Qwen-VL, about 100 s on two cores")
    tiny.add_argument("out", type=Path, metavar="OUT", help="the model folder to write")
    tiny.add_argument("--family", choices=("qwen2-vl", "qwen2.5-vl", "qwen3-vl"), default="qwen3-vl")
    tiny.add_argument("--steps", type=int, metavar="N", help="pre-training steps; 0 leaves the weights random")
    tiny.add_argument("--seed", type=int, default=0)
    tiny.set_defaults(run=_tiny)
    fetch = models.add_parser("import", help="put a base model into a folder and check that it is a Qwen-VL")
    fetch.add_argument("base", metavar="BASE", help="a folder, s3://bucket/prefix, or a Hugging Face hub id")
    fetch.add_argument("out", type=Path, metavar="OUT", help="the model folder to write")
    fetch.add_argument("--revision", default="main", help="branch, tag or commit of a hub id")
    fetch.set_defaults(run=_import)

    train = commands.add_parser("train", help="train one stage of a run's configuration")
    train.add_argument("--config", required=True, metavar="FILE", help="the run's YAML file")
    train.add_argument("--stage", required=True, metavar="NAME", help="which of its stages")
    train.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="such as stages.0.steps=20")
    train.add_argument("--before", type=Path, metavar="ADAPTERS", help="the stack of the stages before this one")
    train.add_argument("--work", type=Path, metavar="FOLDER", help="checkpoints (default OUT.work)")
    train.add_argument("--logs", type=Path, metavar="FOLDER", help="TensorBoard logs (default OUT.logs)")
    train.add_argument("--nproc", type=int, metavar="N", help="processes, one a device (parallel.processes)")
    train.add_argument("--explain", action="store_true", help="print which means to be fast are on and why; train not")
    train.add_argument("model", type=Path, metavar="MODEL", help="the base model's folder")
    train.add_argument("dataset", type=Path, metavar="DATASET", help="a data set that `validate` wrote")
    train.add_argument("out", type=Path, metavar="OUT", help="the stack of adapters to write")
    train.set_defaults(run=_train)

    merge = commands.add_parser("merge", help="merge a stack of adapters into the base, with a proof")
    merge.add_argument("model", type=Path, metavar="MODEL", help="the base model's folder")
    merge.add_argument("adapters", type=Path, metavar="ADAPTERS", help="a stack that `train` wrote")
    merge.add_argument("dataset", type=Path, metavar="DATASET", help="its first samples are the proof's")
    merge.add_argument("out", type=Path, metavar="OUT", help="the model folder to write")
    add_seeing(merge)
    merge.set_defaults(run=_merge)


def add_seeing(command: Any) -> None:
    """The options that say how a model sees a sample. One that is left out takes the configuration's default."""
    command.add_argument("--min-pixels", type=int, metavar="N", help="smaller images are enlarged to this")
    command.add_argument("--max-pixels", type=int, metavar="N", help="larger images are reduced to this")
    command.add_argument("--dtype", choices=("float32", "bfloat16"), help="precision of the weights")


def seeing(arguments: argparse.Namespace) -> Any:
    """The ModelConfig of the options that `add_seeing` declared; ValueError for values that do not go together."""
    from pydantic import ValidationError

    from medforge.config import ModelConfig

    names = ("min_pixels", "max_pixels", "dtype")
    given = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    try:
        return ModelConfig(**given)
    except ValidationError as error:
        raise ValueError(error.errors()[0]["msg"].removeprefix("Value error, ")) from None


def _refuse_to_replace(out: Path) -> None:
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ValueError(f"{out}: is there already; name another folder, or remove it")


def _tiny(arguments: argparse.Namespace) -> None:
    from medforge.config import TinyConfig
    from medforge.models.tiny import build

    _refuse_to_replace(arguments.out)
    if arguments.steps is not None and arguments.steps < 0:
        raise ValueError(f"--steps is {arguments.steps}; 0 or more is expected")
    config = TinyConfig(seed=arguments.seed, **({} if arguments.steps is None else {"steps": arguments.steps}))
    about = build(arguments.out, arguments.family, config)
    loss = "not pre-trained" if about["loss"] is None else f"loss {about['loss']:.3f}"
    print(f"{arguments.out}: {about['family']}, {about['parameters'] / 1e6:.2f} million parameters, {loss}")


def _import(arguments: argparse.Namespace) -> None:
    from medforge.config import ModelConfig
    from medforge.models.families import family_of
    from medforge.models.load import import_base
    from medforge.storage import download

    _refuse_to_replace(arguments.out)
    import_base(ModelConfig(base=arguments.base, revision=arguments.revision), arguments.out, download)
    print(f"{arguments.out}: {family_of(arguments.out).name}")


def _train(arguments: argparse.Namespace) -> None:
    from medforge.config import load_config
    from medforge.train import Inputs, run

    overrides = [*arguments.set, *([] if arguments.nproc is None else [f"parallel.processes={arguments.nproc}"])]
    config = load_config(arguments.config, overrides)
    stage = config.stage(arguments.stage)
    work = arguments.work or arguments.out.with_name(f"{arguments.out.name}.work")
    logs = arguments.logs or arguments.out.with_name(f"{arguments.out.name}.logs")
    inputs = Inputs(arguments.model, arguments.dataset, arguments.before)
    given = (inputs, arguments.out, work, logs, stage, config.model, config.seed, config.parallel, config.checkpoints)
    if arguments.explain:
        from medforge.train.prepare import explain
        from medforge.train.stage import job_of

        print(explain(job_of(*given)))
        return
    _refuse_to_replace(arguments.out)
    about = run(*given)
    figures = "".join(f", {name} {value:.4g}" for name, value in about["validation"].items())
    print(f"{arguments.out}: {about['steps']} steps, best at {about['best_step']}{figures}; checkpoints in {work}")


def _merge(arguments: argparse.Namespace) -> None:
    from medforge.merge import run

    _refuse_to_replace(arguments.out)
    proof = run(arguments.model, arguments.adapters, arguments.dataset, arguments.out, seeing(arguments))
    print(
        f"{arguments.out}: logits differ from base plus adapters by at most {proof['max_logit_difference']:.2g} "
        f"(largest logit {proof['max_logit']:.3g}); the best token is the same at {proof['same_best_token']:.1%}"
    )
