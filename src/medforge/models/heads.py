"""The task heads of the multi-task model, and the losses that are trained together with the language loss.

The region head gives a box, the match head says whether a claim fits the image. Both read the hidden state of the last
prompt token, before any answer ("pooled"). Losses are given an item at a time: the training loop adds them up over the
micro-batches and devices of an optimizer step and divides by the step's totals. This module needs torch when it is
imported, since a head is a torch module.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch.nn import functional

from medforge.files import read_json, write_atomic, write_json
from medforge.models.load import load_model

Weighting = Literal["uncertainty", "fixed"]

TASKS = ("language", "region", "match")
# in a folder of their own: servers load every *.safetensors that stands beside a model's own
WEIGHTS_FILE, ABOUT_FILE = "heads/heads.safetensors", "heads/heads.json"
MAX_LOG_VARIANCE = 5.0
LOG_VARIANCE_RATE = 10.0
L1_WEIGHT, GIOU_WEIGHT = 5.0, 2.0


class TaskHeads(torch.nn.Module):
    """The heads that are asked for, for hidden states of `hidden` features, and each task's learned log-variance.

    `log_variance` holds one s = log(sigma²) of shape [1] for language and for each head, 0 at first. It takes no
    weight decay, which would pull the tasks' weights together: see `parameter_groups`. Weights are float32.
    """

    def __init__(self, hidden: int, region: bool, match: bool) -> None:
        super().__init__()
        self.hidden = hidden
        self.region_head = _mlp(hidden, 4) if region else None
        self.match_head = _mlp(hidden, 1) if match else None
        tasks = [name for name, wanted in zip(TASKS, (True, region, match), strict=True) if wanted]
        # of shape [1], as sharded training has no parameters without a dimension
        self.log_variance = torch.nn.ParameterDict({name: torch.nn.Parameter(torch.zeros(1)) for name in tasks})

    def region(self, pooled: torch.Tensor) -> torch.Tensor:
        """A box (centre x, centre y, width, height), 0–1, for each of `pooled` [N, hidden]: float32 of [N, 4]."""
        assert self.region_head is not None, "these heads have no region head"
        return torch.sigmoid(_float32(self.region_head, pooled))

    def match(self, pooled: torch.Tensor) -> torch.Tensor:
        """The logit that the claim fits the image, for each of `pooled` [N, hidden]: float32 of [N]."""
        assert self.match_head is not None, "these heads have no match head"
        return _float32(self.match_head, pooled).squeeze(-1)


def _mlp(hidden: int, outputs: int) -> torch.nn.Sequential:
    return torch.nn.Sequential(
        torch.nn.LayerNorm(hidden),
        torch.nn.Linear(hidden, hidden),
        torch.nn.GELU(),
        torch.nn.Linear(hidden, outputs),
    )


def _float32(head: torch.nn.Module, pooled: torch.Tensor) -> torch.Tensor:
    """The head's output in float32, also inside an autocast: in bfloat16 a box has steps of a 256th."""
    with torch.autocast(pooled.device.type, enabled=False):
        return head(pooled.float())


def parameter_groups(heads: TaskHeads, learning_rate: float, weight_decay: float) -> list[dict[str, Any]]:
    """Three groups for a torch optimizer: the matrices; biases and norms, without decay; and the log-variances.

    A log-variance has to travel as far as the logarithm of its task's loss, and under AdamW a parameter moves by about
    its rate a step: at the heads' own rate the weights would hardly change in a short stage. It gets
    `LOG_VARIANCE_RATE` times that.
    """
    weights = {id(parameter) for parameter in heads.log_variance.values()}
    trained = [
        parameter for parameter in heads.parameters() if parameter.requires_grad and id(parameter) not in weights
    ]
    rate = learning_rate * LOG_VARIANCE_RATE
    return [
        {"params": [p for p in trained if p.ndim > 1], "lr": learning_rate, "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "lr": learning_rate, "weight_decay": 0.0},
        {"params": list(heads.log_variance.values()), "lr": rate, "weight_decay": 0.0},
    ]


def region_loss(boxes_cxcywh: torch.Tensor, target_xyxy: torch.Tensor) -> torch.Tensor:
    """5 L1 + 2 (1 - GIoU) of each predicted box [N, 4] against its target [N, 4], both 0–1: [N].

    L1 is the sum over centre, width and height, as in DETR (Carion et al. 2020, arXiv 2005.12872, section 3.1; the
    weights are those of its appendix). The mean is the sum over these divided by the number of boxes.
    """
    x1, y1, x2, y2 = target_xyxy.float().unbind(-1)
    target = torch.stack([(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1], dim=-1)
    boxes = boxes_cxcywh.float()
    distance = (boxes - target).abs().sum(-1)
    overlap = giou(to_xyxy(boxes), target_xyxy.float())
    return L1_WEIGHT * distance + GIOU_WEIGHT * (1 - overlap)


def to_xyxy(boxes_cxcywh: torch.Tensor) -> torch.Tensor:
    """(centre x, centre y, width, height) of [N, 4] as (x1, y1, x2, y2)."""
    x, y, width, height = boxes_cxcywh.unbind(-1)
    return torch.stack([x - width / 2, y - height / 2, x + width / 2, y + height / 2], dim=-1)


def giou(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Generalised intersection over union of pairs of boxes [N, 4] as (x1, y1, x2, y2) with x1 <= x2, y1 <= y2: [N].

    IoU - (C - U) / C with the union U and the smallest box C around both, -1 to 1, 1 for equal boxes (Rezatofighi et
    al. 2019, arXiv 1902.09630, algorithm 1). Two boxes without area at one place have 0.
    """
    least = torch.finfo(one.dtype).tiny
    shared = _area(torch.maximum(one[:, :2], other[:, :2]), torch.minimum(one[:, 2:], other[:, 2:]))
    around = _area(torch.minimum(one[:, :2], other[:, :2]), torch.maximum(one[:, 2:], other[:, 2:]))
    union = _area(one[:, :2], one[:, 2:]) + _area(other[:, :2], other[:, 2:]) - shared
    return shared / union.clamp(min=least) - (around - union) / around.clamp(min=least)


def _area(low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    return (high - low).clamp(min=0).prod(-1)


def match_loss(
    logits: torch.Tensor, targets: torch.Tensor, missed_weight: float, gamma: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(w · focal loss, w) of each claim, both [N]; the mean is the sum of the one over the sum of the other.

    `targets` [N] is 1 where the claim fits. The focal loss is -(1 - p)^gamma · ln p, p the probability that is given to
    the truth (Lin et al. 2017, arXiv 1708.02002, equation 4). w is `missed_weight` where the claim fits, so that a
    missed match costs so many times a false alarm, else 1. That shifts the calibration: a threshold is to be chosen on
    validation data.
    """
    fits = targets.float()
    margin = logits.float() * (2 * fits - 1)
    # (1 - p)^gamma by its logarithm: the power's own gradient is infinite where p rounds to 1
    focal = -functional.logsigmoid(margin) * torch.exp(gamma * functional.logsigmoid(-margin))
    weights = 1 + (missed_weight - 1) * fits
    return weights * focal, weights


def task_weights(
    heads: TaskHeads, weighting: Weighting, weights: Mapping[str, float], present: Collection[str]
) -> dict[str, torch.Tensor]:
    """The factor of each task's loss, float32 scalars, for the tasks that are `present` in an optimizer step.

    uncertainty: exp(-s) for the classifications, language and match, and exp(-s)/2 for the regression of the region,
    with the learned s = log(sigma²) (Kendall, Gal, Cipolla 2018, arXiv 1705.07115, equation 10; its log sigma terms
    are the `penalty`). s counts as at most 5 either way, but its gradient passes, so that it comes back.
    fixed: `weights`, which uncertainty does not read; ValueError when it lacks a task.

    The factors carry a gradient to s. Work them out anew for each backward pass.
    """
    tasks = _in_order(heads, present)
    if weighting == "fixed":
        if missing := [task for task in tasks if task not in weights]:
            raise ValueError(f"weights: has none for {' and '.join(missing)}; give each task that is trained a weight")
        device = heads.log_variance["language"].device
        return {task: torch.tensor(float(weights[task]), device=device) for task in tasks}
    halves = {"language": 1.0, "region": 0.5, "match": 1.0}
    return {task: halves[task] * torch.exp(-_clamped(heads, task)) for task in tasks}


def penalty(heads: TaskHeads, present: Collection[str]) -> torch.Tensor:
    """The sum of s/2 over the tasks that are `present`, a float32 scalar. For uncertainty only, once an optimizer step.

    It keeps s from growing until no loss counts. An absent task has no term, hence no gradient.
    """
    terms = [_clamped(heads, task) / 2 for task in _in_order(heads, present)]
    return torch.stack(terms).sum() if terms else torch.zeros((), device=heads.log_variance["language"].device)


def join(
    losses: Mapping[str, torch.Tensor], heads: TaskHeads, weighting: Weighting, weights: Mapping[str, float]
) -> torch.Tensor:
    """One loss from the tasks' mean losses, each a scalar: sum of `task_weights` · loss, with uncertainty + `penalty`.

    A task that is not in `losses` drops out, its s too. A step that is cut into micro-batches has the same value and
    gradient by the sum of factor · share over its parts, a share being the part's sum over the step's total, and the
    penalty once.
    """
    factors = task_weights(heads, weighting, weights, losses.keys())
    joined = torch.stack([factor * losses[task].float() for task, factor in factors.items()]).sum()
    return joined + penalty(heads, losses.keys()) if weighting == "uncertainty" else joined


def _in_order(heads: TaskHeads, present: Collection[str]) -> list[str]:
    """The tasks in one order: a set's own differs from process to process, and sums of floats with it."""
    assert set(present) <= set(heads.log_variance), f"{present} but the heads have {list(heads.log_variance)}"
    return [task for task in TASKS if task in present]


def _clamped(heads: TaskHeads, task: str) -> torch.Tensor:
    """s held within its bounds, with the gradient as if it were free (a straight-through clamp)."""
    value = heads.log_variance[task].float()[0]
    return value + (value.clamp(-MAX_LOG_VARIANCE, MAX_LOG_VARIANCE) - value).detach()


def save_heads(heads: TaskHeads, folder: Path) -> None:
    """Write heads/heads.safetensors and heads/heads.json to `folder`. The same heads give the same bytes."""
    from safetensors.torch import save

    tensors = {name: tensor.detach().float().cpu().contiguous() for name, tensor in heads.state_dict().items()}
    region, match = heads.region_head is not None, heads.match_head is not None
    write_atomic(folder / WEIGHTS_FILE, save(tensors))
    write_json(folder / ABOUT_FILE, {"schema_version": 1, "hidden": heads.hidden, "region": region, "match": match})
    (folder / ABOUT_FILE).parent.chmod(0o755)
    for name in (WEIGHTS_FILE, ABOUT_FILE):
        (folder / name).chmod(0o644)


def load_heads(folder: Path) -> TaskHeads | None:
    """The heads that `save_heads` wrote to `folder`, on the CPU; None where it has none.

    Raises ValueError that names the file when one of the two is missing or broken, or they do not fit together.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    about, path = folder / ABOUT_FILE, folder / WEIGHTS_FILE
    if not about.exists() and not path.exists():
        return None
    with torch.device("meta"):  # shapes alone: nothing is drawn from the random state
        heads = TaskHeads(**_settings(about))
    if not path.is_file():
        raise ValueError(f"{path}: no such file, but {about} tells of heads; copy both, or neither")
    try:
        tensors = load(path.read_bytes())
    except SafetensorError as error:
        raise ValueError(f"{path}: is not a whole safetensors file: {error}") from None
    expected = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in heads.state_dict().items()}
    found = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            said = f"{expected.get(name, 'none')} after {about}, found {found.get(name, 'none')}"
            raise ValueError(f"{path}: tensor {name}: expected {said}; the two files are not of one save")
        if not torch.isfinite(tensors[name]).all():
            raise ValueError(f"{path}: tensor {name}: has values that are not finite; the training diverged")
    heads.load_state_dict({name: tensor.clone() for name, tensor in tensors.items()}, assign=True)
    return heads


def _settings(path: Path) -> dict[str, Any]:
    """hidden, region and match of a heads.json."""
    content = read_json(path)
    if not isinstance(content, dict) or content.get("schema_version") != 1:
        raise ValueError(f"{path}: is no heads.json of schema_version 1, but {json.dumps(content)[:80]}")
    for name, kind, expected in (
        ("hidden", int, "a number"),
        ("region", bool, "true or false"),
        ("match", bool, "true or false"),
    ):
        value = content.get(name)
        if type(value) is not kind or (kind is int and not 1 <= value <= 1 << 20):
            raise ValueError(f"{path}: field {name} is {json.dumps(value)}; {expected} is expected")
    return {name: content[name] for name in ("hidden", "region", "match")}


@dataclass
class TaskModel:
    """A vision-language model, as transformers loads it, and the heads that read its hidden states."""

    model: Any
    heads: TaskHeads


def load_task_model(folder: Path, dtype: str, adapters: Sequence[Path] = ()) -> TaskModel:
    """The model of `folder` with `adapters` merged in (see `medforge.models.load.load_model`), and its heads beside it.

    The heads are those of the last adapter that has some, else of `folder`; float32 and on the model's device. Raises
    ValueError when there are none, they are broken, or they are of a model with another hidden size.
    """
    for place in (*reversed(adapters), folder):
        heads = load_heads(place)
        if heads is not None:
            break
    else:
        raise ValueError(
            f"{folder}: neither it nor an adapter has heads ({ABOUT_FILE}); train a stage with tasks first"
        )
    model = load_model(folder, dtype, adapters)
    hidden = model.config.get_text_config().hidden_size
    if heads.hidden != hidden:
        raise ValueError(f"{place / ABOUT_FILE}: hidden is {heads.hidden}, but the model of {folder} has {hidden}")
    return TaskModel(model, heads.to(model.device))
