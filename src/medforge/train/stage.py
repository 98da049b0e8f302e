"""One stage: LoRA on the named parts of the base plus the adapters before it, by the Hugging Face Trainer.

Only answer tokens carry loss. Checkpoints go to a work folder; a stage that was killed goes on from the newest whole
one, and ends with the same adapter as an unbroken run.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medforge.config import ModelConfig, StageConfig
from medforge.dataset import Dataset, choose
from medforge.files import link_tree, new_folder, read_json, tree_digest, write_json
from medforge.models.determinism import seeded
from medforge.models.encode import IGNORE, Encoder
from medforge.models.families import family_of, lora_targets
from medforge.models.load import load_model, stack
from medforge.train.data import EncodedSamples

STAGE_FILES = ("adapter_config.json", "adapter_model.safetensors")


@dataclass(frozen=True)
class Inputs:
    """What a stage reads. `adapters` is the stack of the stages before it, or None for the first."""

    base: Path
    dataset: Path
    adapters: Path | None


def run(
    inputs: Inputs, out: Path, work: Path, logs: Path, stage: StageConfig, model_config: ModelConfig, seed: int
) -> dict[str, Any]:
    """Train `stage` and write the stack, with its adapter added, to the folder `out`.

    `work` keeps checkpoints, `logs` the TensorBoard files. Returns the content of the adapter's stage.json: settings,
    digests of base, data and earlier adapters, the best step, and the curves.

    Raises ValueError when the data set has no training samples, or a part of `stage.tune` is not in the model.
    """
    before = stack(inputs.adapters)
    if any(path.name[3:] == stage.name for path in before):
        raise ValueError(f"stage {stage.name!r} is in {inputs.adapters} already")
    dataset = Dataset.open(inputs.dataset)
    encoder = Encoder(inputs.base, model_config.min_pixels, model_config.max_pixels)
    train = choose(dataset.samples("train"), stage.samples, seed)
    held_out = choose(dataset.samples("validation"), stage.validation_samples, seed)
    if not train:
        raise ValueError(f"{inputs.dataset}: the train split is empty")
    with seeded(seed):
        model = _with_lora(load_model(inputs.base, model_config.dtype, before), inputs.base, stage)
        arguments = _arguments(stage, seed, work, len(train), bool(held_out), model_config.dtype)
        rows = [EncodedSamples(dataset, samples, encoder) for samples in (train, held_out)]
        trainer = _trainer(model, arguments, stage.name, logs, *rows)
        done = _last_whole(work)
        if done and read_json(Path(done) / "trainer_state.json")["global_step"] >= trainer.args.max_steps:
            _take_up(trainer, Path(done))  # the Trainer would train one step too many
        else:
            trainer.train(resume_from_checkpoint=done)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    about = {
        "schema_version": 1,
        "stage": stage.model_dump(),
        "seed": seed,
        "base": tree_digest(inputs.base),
        "data": dataset.digest,
        "before": {path.name: tree_digest(path) for path in before},
        "trainable_parameters": trainable,
        "samples": {"train": len(train), "validation": len(held_out)},
        "steps": trainer.state.global_step,
        "best_step": trainer.state.best_global_step if held_out else trainer.state.global_step,
        "best_by": "eval_loss" if held_out else "last step (the data set has no validation split)",
        "eval_loss": trainer.state.best_metric if held_out else None,
        "curves": _curves(trainer.state.log_history),
    }
    with new_folder(out) as folder:
        for path in before:
            link_tree(path, folder / path.name)
        adapter = folder / f"{len(before) + 1:02d}-{stage.name}"
        _save_adapter(model, adapter)
        write_json(adapter / "stage.json", about)
        plot_curves(about["curves"], stage.name, adapter / "curves.png")
    return about


def _save_adapter(model: Any, folder: Path) -> None:
    """Write the adapter so that the same weights give the same bytes on any machine."""
    model.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)  # peft's empty model card
    settings = read_json(folder / "adapter_config.json")
    settings["base_model_name_or_path"] = None  # peft puts the path on this machine
    settings["target_modules"] = sorted(settings["target_modules"])  # peft writes a set, in each process's own order
    write_json(folder / "adapter_config.json", settings)
    for path in folder.iterdir():
        path.chmod(0o644)  # safetensors makes 0600


def _with_lora(model: Any, base: Path, stage: StageConfig) -> Any:
    from peft import LoraConfig, get_peft_model

    targets = lora_targets(model, family_of(base), list(stage.tune))
    lora = stage.lora
    config = LoraConfig(r=lora.r, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=targets)
    return get_peft_model(model, config)


def _trainer(model: Any, arguments: Any, name: str, logs: Path, train: EncodedSamples, held_out: EncodedSamples) -> Any:
    from transformers import PrinterCallback, ProgressCallback, Trainer
    from transformers.integrations import TensorBoardCallback

    from medforge.train.callbacks import MarkWhole, ShowProgress

    logs.mkdir(parents=True, exist_ok=True)
    board = TensorBoardCallback()
    board.logging_dir = str(logs)  # TrainingArguments no longer takes the folder; it would be work/runs
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=train,
        eval_dataset=held_out if len(held_out) else None,
        data_collator=train.collate,
        compute_loss_func=_answer_loss,
        callbacks=[MarkWhole(), board, ShowProgress(f"training {name}")],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    return trainer


def _arguments(stage: StageConfig, seed: int, work: Path, samples: int, has_validation: bool, dtype: str) -> Any:
    """The Hugging Face TrainingArguments of a stage."""
    import torch
    from transformers import TrainingArguments

    gpu = torch.cuda.is_available()
    steps = stage.steps or _steps(samples, stage)
    every = min(stage.evaluate_every, steps)
    # a logged loss is a mean since the last log: it must not straddle a checkpoint, or a resumed run logs another
    log_every = max(n for n in range(1, min(10, every) + 1) if every % n == 0)
    return TrainingArguments(
        output_dir=str(work),
        max_steps=steps,
        per_device_train_batch_size=stage.batch_size,
        per_device_eval_batch_size=stage.batch_size,
        gradient_accumulation_steps=stage.accumulate,
        learning_rate=stage.learning_rate,
        lr_scheduler_type=stage.schedule if stage.schedule != "constant" else "constant_with_warmup",
        warmup_steps=math.ceil(stage.warmup * steps),
        weight_decay=stage.weight_decay,
        max_grad_norm=stage.max_grad_norm,
        optim="adamw_torch",
        seed=seed,
        data_seed=seed,
        bf16=gpu and dtype == "bfloat16",
        logging_steps=log_every,
        eval_strategy="steps" if has_validation else "no",
        eval_steps=every,
        save_steps=every,
        save_total_limit=2,
        load_best_model_at_end=has_validation,
        metric_for_best_model="eval_loss" if has_validation else None,
        greater_is_better=False,
        remove_unused_columns=False,
        label_names=["labels"],
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=gpu,
        use_cpu=not gpu,
    )


def _steps(samples: int, stage: StageConfig) -> int:
    assert stage.epochs is not None
    return max(1, math.ceil(stage.epochs * samples / (stage.batch_size * stage.accumulate)))


def _last_whole(work: Path) -> str | None:
    """The newest checkpoint that was written to its end, and of which nothing was deleted since."""
    from medforge.train.callbacks import WHOLE

    marks = {path.parent: read_json(path) for path in work.glob(f"checkpoint-*/{WHOLE}")}
    whole = [folder for folder, mark in marks.items() if all((folder / name).is_file() for name in mark["files"])]
    if not whole:
        return None
    newest = max(whole, key=lambda folder: int(marks[folder]["step"]))
    state = read_json(newest / "trainer_state.json")
    if state["best_model_checkpoint"] is not None:  # the work folder may have been moved since
        best = str(work / Path(state["best_model_checkpoint"]).name)
        if best != state["best_model_checkpoint"]:
            write_json(newest / "trainer_state.json", state | {"best_model_checkpoint": best})
    return str(newest)


def _take_up(trainer: Any, done: Path) -> None:
    """Give the trainer the state and the weights that it had at its end, when only the result was not yet written."""
    from peft import load_peft_weights, set_peft_model_state_dict
    from transformers import TrainerState

    trainer.state = TrainerState.load_from_json(str(done / "trainer_state.json"))
    weights = load_peft_weights(str(trainer.state.best_model_checkpoint or done), device="cpu")
    set_peft_model_state_dict(trainer.model, weights)


def _answer_loss(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Any:
    """The mean loss over all answer tokens of an optimizer step, however the step is cut into batches.

    The models' own loss is a mean over each batch, so that with `accumulate` an answer would count the more, the
    fewer tokens the other answers of its batch have. `num_items_in_batch` is the step's number of answer tokens.
    """
    import torch

    following = labels[:, 1:].to(outputs.logits.device)
    kept = following != IGNORE
    logits = outputs.logits[:, :-1][kept].float()
    total = torch.nn.functional.cross_entropy(logits, following[kept], reduction="sum")
    return total / (kept.sum() if num_items_in_batch is None else num_items_in_batch)


def _curves(history: list[dict[str, Any]]) -> list[dict[str, float]]:
    """The log's losses, learning rates and gradient norms by step; timings stay out, as they differ each time."""
    kept = ("step", "loss", "eval_loss", "learning_rate", "grad_norm")
    rows = [{name: row[name] for name in kept if name in row} for row in history]
    return [row for row in rows if "loss" in row or "eval_loss" in row]


def plot_curves(curves: list[dict[str, float]], name: str, path: Path) -> None:
    """Training and validation loss against the step, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    for key, label, style in (("loss", "training", "-"), ("eval_loss", "validation", "o-")):
        points = [(row["step"], row[key]) for row in curves if key in row]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, markersize=4)
    axes.set(title=f"Stage {name}", xlabel="step", ylabel="loss (nats a token)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120, metadata={"Software": None})
