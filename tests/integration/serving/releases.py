"""A release that can be served: an untrained tiny model with heads, published."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path

from medforge.config import PolicyConfig, RuleConfig, TinyConfig
from medforge.files import write_json
from medforge.release.policy import judge
from medforge.release.publish import publish
from medforge.storage import Store

NOW = datetime(2026, 1, 2, tzinfo=timezone.utc)
ABOUT = {"name": "unit", "code_version": "0.1.0", "min_pixels": 56 * 56, "max_pixels": 112 * 112, "base": "tiny"}


def publish_tiny(environment: Mapping[str, str], bucket: str, channel: str, work: Path, seed: int = 0) -> str:
    """Build it in the folder `work` and publish it to the store of `environment`. Returns its digest."""
    import torch

    from medforge.models.heads import TaskHeads, save_heads
    from medforge.models.tiny import build

    build(work / "model", "qwen3-vl", TinyConfig(steps=0))
    torch.manual_seed(seed)
    save_heads(TaskHeads(128, region=True, match=True), work / "model")
    (work / "model" / "empty.txt").touch()  # KServe's downloader skips it
    arms = {name: {"all": {"exact_match": {"value": v, "n": 100}}} for name, v in (("tuned", 0.9), ("base", 0.4))}
    write_json(work / "results.json", {"arms": arms})
    policy = PolicyConfig(name="unit", rules=[RuleConfig(name="good", metric="exact_match", bound=0.5, margin=0.1)])
    write_json(work / "verdict.json", judge({"arms": arms}, policy))
    parts = {name: work / name for name in ("model", "results.json", "verdict.json")}
    return str(publish(Store.from_environment(environment), bucket, channel, parts, ABOUT, NOW)["release"])
