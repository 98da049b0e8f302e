"""The steps that tell whether a model is better: answers, scores, verdict and report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from medforge.files import read_json, write_json
from medforge.steps.common import Metrics, base_name, checkpoints, log, seeing
from medforge.steps.settings import read
from medforge.workspace import Step, code_version, run_step


def predict(config: str, arm: str, model: str, dataset: str, predictions: str) -> None:
    """Let the model answer the split to be scored; `arm` is what its predictions are called."""
    run = read(config, "predict")
    settings = {
        "arm": arm,
        "evaluate": run.evaluate.model_dump(),
        "model": seeing(run),
        "dtype": run.model.dtype,
        "seed": run.seed,
    }
    inputs = {"model": Path(model), "dataset": Path(dataset)}

    def body(out: dict[str, Path], scratch: Path) -> dict[str, Any]:
        from medforge.evaluate.predict import run as run_predict

        out["predictions"].mkdir(exist_ok=True)
        about = run_predict(
            arm,
            Path(model),
            Path(dataset),
            out["predictions"] / f"{arm}.jsonl",
            run.evaluate,
            run.model,
            run.seed,
            scratch / "copies",
            checkpoints(run).url,
        )
        return {"model": about["model"], "n": about["n"]}

    run_step(Step("evaluate", f"predict-{arm}", inputs, settings, {"predictions": Path(predictions)}), body)


def evaluate(config: str, base: str, tuned: str, dataset: str, results: str, metrics: Metrics) -> None:
    """Score the predictions of both arms; results.json and comparison.md go to the folder `results`."""
    run = read(config, "evaluate")
    about = {"run": run.name, "base model": base_name(run), "code": code_version()}
    files = {"base": Path(base) / "base.jsonl", "tuned": Path(tuned) / "tuned.jsonl"}

    def body(out: dict[str, Path], scratch: Path) -> dict[str, Any]:
        from medforge.evaluate import compare, score
        from medforge.files import write_atomic

        scored = score.run(files, Path(dataset), out["results"], about)
        write_atomic(out["results"] / "comparison.md", compare.comparison(scored))
        cells = {f"{arm}_{name}": scored["arms"][arm]["all"][name]["value"] for arm in files for name in _HEADLINE}
        return {name: value for name, value in cells.items() if value is not None}

    inputs = {"base": files["base"], "tuned": files["tuned"], "dataset": Path(dataset)}
    log(metrics, run_step(Step("evaluate", "evaluate", inputs, about, {"results": Path(results)}), body))


_HEADLINE = ("exact_match", "token_f1", "closed_accuracy", "perplexity", "region_iou", "match_auroc")


def gate(config: str, results: str, verdict: str, metrics: Metrics) -> bool:
    """Judge the results by the run's policy; the verdict goes to the file `verdict`. Returns whether it passed."""
    run = read(config, "gate")
    file = Path(results) / "results.json"

    def body(out: dict[str, Path], scratch: Path) -> dict[str, Any]:
        from medforge.release.policy import judge, verdict_markdown

        judged = judge(read_json(file), run.policy)
        write_json(out["verdict"], judged)
        print(verdict_markdown(judged), flush=True)
        return {"passed": judged["passed"], "rules": len(judged["rules"])}

    step = Step("release", "gate", {"results": file}, run.policy.model_dump(), {"verdict": Path(verdict)})
    values = run_step(step, body)
    log(metrics, values)
    return bool(values["passed"])


def report(
    config: str, results: str, base: str, tuned: str, dataset: str, adapters: str, verdict: str, html: str
) -> None:
    """Write the self-contained report to the file `html`."""
    run = read(config, "report")
    files = {"base": Path(base) / "base.jsonl", "tuned": Path(tuned) / "tuned.jsonl"}

    def body(out: dict[str, Path], scratch: Path) -> None:
        from medforge.dataset import Dataset
        from medforge.evaluate import report as write_report
        from medforge.evaluate import score
        from medforge.files import link_tree
        from medforge.models.load import stack

        curves = {path.name: read_json(path / "stage.json")["curves"] for path in stack(Path(adapters))}
        written = write_report.write(
            read_json(Path(results) / "results.json"),
            {arm: score.read_arm(arm, path) for arm, path in files.items()},
            Dataset.open(dataset),
            scratch,
            read_json(Path(verdict)),
            curves,
            samples=run.evaluate.report_samples,
        )
        link_tree(written, out["html"])

    inputs = {
        "results": Path(results) / "results.json",
        "base": files["base"],
        "tuned": files["tuned"],
        "dataset": Path(dataset),
        "adapters": Path(adapters),
        "verdict": Path(verdict),
    }
    run_step(Step("evaluate", "report", inputs, run.evaluate.report_samples, {"html": Path(html)}), body)
