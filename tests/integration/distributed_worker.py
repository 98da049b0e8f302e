"""What test_distributed runs in two processes, and in one for comparison. `python -m … JOBS OUT` under torchrun.

A job trains one model for STEPS steps of MICRO micro-batches in one strategy. Micro-batches have different sizes, are
dealt out unevenly, and only some use the second head.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from medforge.lifetime import end_with_parent
from medforge.train.parallel import Engine, State, World, engine, start, stop

STEPS, HALF, MICRO = 4, 2, 3
IMAGE_TOKENS = 4
FOLDER: dict[str, Path] = {}  # "tiny": where the tiny model is
Share = Callable[[Engine, int, int], torch.Tensor]


class Toy(torch.nn.Module):
    """A frozen layer between trained ones. `second` is used in some micro-batches, `idle` in none.

    Sizes are odd, so that shards are padded, and `first` is big enough to be sharded by ZeRO-3.
    """

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = torch.nn.Linear(101, 151)
        self.frozen = torch.nn.Linear(151, 151).requires_grad_(False)
        self.head = torch.nn.Linear(151, 1)
        self.second = torch.nn.Linear(151, 3)
        self.scale = torch.nn.Parameter(torch.zeros(1))
        self.idle = torch.nn.Parameter(torch.ones(7))

    def forward(self, x: torch.Tensor, second: float | None) -> torch.Tensor:
        """The loss; the second head's part times `second`, or without the head for None."""
        hidden = torch.relu(self.frozen(torch.tanh(self.first(x))))
        share = (self.head(hidden)[:, 0] - x.sum(1)).square() * torch.exp(-self.scale) + self.scale / 2
        return share.sum() + (0.0 if second is None else second * self.second(hidden).square().sum())


def toy_share(made: Engine, step: int, micro: int) -> torch.Tensor:
    x = torch.randn(2 + micro, 101, generator=torch.Generator().manual_seed(10 * step + micro))
    # ZeRO-3 gathers weights by submodule: all processes run the head, with a weight of 0 where it has nothing to do
    idle = 0.0 if made.whole_forward else None
    return made(x, 1.0 if (step + micro) % 2 else idle) / sum(2 + micro for micro in range(MICRO))


def tiny_batch(step: int, micro: int) -> dict[str, torch.Tensor]:
    """Two rows, each an image of 64 × 64 pixels, then words at random; padded, with loss on the last words."""
    from transformers import AutoTokenizer

    generator = torch.Generator().manual_seed(10 * step + micro)
    tokenizer = AutoTokenizer.from_pretrained(FOLDER["tiny"])
    start, image, end = tokenizer.convert_tokens_to_ids(["<|vision_start|>", "<|image_pad|>", "<|vision_end|>"])
    words = 5 + 2 * micro
    text = torch.randint(20, 200, (2, words), generator=generator)
    prompt = torch.tensor([[start, *[image] * IMAGE_TOKENS, end]] * 2)
    ids = torch.cat([prompt, text], dim=1)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == image).int(),
        "labels": torch.where(torch.arange(ids.shape[1]) < ids.shape[1] - words + 1, -100, ids),
        "pixel_values": torch.randn(2 * 4 * IMAGE_TOKENS, 3 * 2 * 16 * 16, generator=generator),
        "image_grid_thw": torch.tensor([[1, 4, 4]] * 2),
    }


def tiny_share(made: Engine, step: int, micro: int) -> torch.Tensor:
    batch = tiny_batch(step, micro)
    labels = batch.pop("labels")[:, 1:]
    bfloat16 = any(parameter.dtype == torch.bfloat16 for parameter in made.module.parameters())
    with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        logits = made(**batch).logits[:, :-1]
    total = torch.nn.functional.cross_entropy(logits[labels != -100].float(), labels[labels != -100], reduction="sum")
    return total / sum(2 * (4 + 2 * micro) for micro in range(MICRO))


def tiny_model(dtype: torch.dtype) -> torch.nn.Module:
    from peft import LoraConfig, get_peft_model
    from transformers import Qwen3VLForConditionalGeneration

    model = Qwen3VLForConditionalGeneration.from_pretrained(FOLDER["tiny"], dtype=dtype)
    torch.manual_seed(0)
    targets = r".*(visual\.merger\.linear_fc[12]|language_model\.layers\.\d+\.(self_attn\.[qv]_proj|mlp\.up_proj))"
    lora = LoraConfig(r=32, lora_alpha=32, lora_dropout=0.0, target_modules=targets, init_lora_weights=False)
    return get_peft_model(model, lora)


def make(model: str, strategy: str, offload: str, world: World) -> tuple[Engine, Share]:
    dtype = torch.bfloat16 if model == "tiny-bfloat16" else torch.float32
    module = Toy() if model == "toy" else tiny_model(dtype)
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    groups = []
    for names, decay in ((list(trained)[::2], 0.1), (list(trained)[1::2], 0.0)):
        groups.append({"params": [trained[n] for n in names], "names": names, "lr": 1.0, "weight_decay": decay})
    parallel: Any = SimpleNamespace(strategy=strategy, offload=offload)
    clip = 2.0 if model == "toy" else 0.5
    return engine(module, groups, parallel, world, clip), toy_share if model == "toy" else tiny_share


def dealt(step: int, world: World) -> list[int]:
    """This process's micro-batches: 2 and 1 of 3, and in the last step none for process 1."""
    if step == STEPS - 1:
        return list(range(MICRO)) if world.rank == 0 else []
    return list(range(world.rank, MICRO, world.size))


def train(made: Engine, share: Share, steps: range, poison: float = 1.0) -> list[dict[str, float]]:
    """The loss and the gradients' norm of each step. The last process's share is multiplied by `poison`."""
    curve = []
    for step in steps:
        mine = dealt(step, made.world)
        rounds = made.most(len(mine)) if made.whole_forward else len(mine)
        loss = 0.0
        for turn in range(rounds):
            part = share(made, step, mine[turn] if turn < len(mine) else 0)
            part = part if turn < len(mine) else part * 0
            loss += float(part.detach())
            made.backward(part * poison if made.world.rank == made.world.size - 1 else part)
        norm = made.step([1e-2 / (step + 1), 2e-2])
        curve.append({"loss": made.total([loss])[0], "norm": norm})
    return curve


def answer(made: Engine) -> list[list[int]]:
    """What the model says, greedily, on a batch with images."""
    batch = tiny_batch(0, 1)
    del batch["labels"]
    made.module.eval()
    longest = 6 - 2 * made.world.rank  # each process stops at another length
    with torch.no_grad():
        generate: Any = made.module.generate
        found = generate(
            **batch, min_new_tokens=longest, max_new_tokens=longest, do_sample=False, synced_gpus=made.whole_forward
        )
    made.module.train()
    return found[:, batch["input_ids"].shape[1] :].tolist()


def run(job: dict[str, Any], world: World, local: State | None) -> tuple[dict[str, Any], State, State]:
    """One job's curves, and the states after HALF and after all steps. `local` is a state that one process saved."""
    made, share = make(job["model"], job["strategy"], job["offload"], world)
    curve = train(made, share, range(HALF))
    half = made.state()
    before = made.weights()
    refused = train(made, share, range(HALF, HALF + 1), poison=float("nan"))
    after = made.weights()
    kept = all(torch.equal(before[name], after[name]) for name in before)
    curve += train(made, share, range(HALF, STEPS))
    whole = made.state()
    result: dict[str, Any] = {"curve": curve, "refused_norm": str(refused[0]["norm"]), "kept": kept}
    result["any"] = [made.any(world.rank == 1), made.any(False)]
    result["empty_elsewhere"] = world.rank == 0 or (half == {} and before == {})
    if local is not None:
        made, share = make(job["model"], job["strategy"], job["offload"], world)
        made.load_state(local)
        result["continued"] = train(made, share, range(HALF, STEPS))
    if job["model"] == "tiny":
        result["answer"] = answer(made)
    result["sharded"] = [name for name, p in made.module.named_parameters() if not p.numel()]
    return result, half, whole


def main(jobs_file: str, out: str) -> None:
    """Run the jobs of a JSON file; write <name>.<rank>.json, and from process 0 <name>.half.pt and <name>.whole.pt."""
    end_with_parent()  # torchrun; a process that waits for another would outlive it
    world = start()
    folder, given = Path(out), json.loads(Path(jobs_file).read_text())
    FOLDER["tiny"] = Path(given["tiny"])
    for job in given["jobs"]:
        name = f"{job['model']}-{job['strategy']}-{job['offload']}"
        local = torch.load(job["local"]) if job.get("local") else None
        result, half, whole = run(job, world, local)
        (folder / f"{name}.{world.rank}.json").write_text(json.dumps(result))
        if world.rank == 0:
            torch.save(half, folder / f"{name}.half.pt")
            torch.save(whole, folder / f"{name}.whole.pt")
    stop(world)


if __name__ == "__main__":
    main(*sys.argv[1:])
