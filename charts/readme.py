"""`python charts/readme.py [--check]`: write the chart's README.md from the comments of its values.yaml.

A value is described by the `# -- …` above it; lines that begin with `# ` go on with it. A block that holds described
values is not described itself.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

import yaml

CHART = Path(__file__).parent / "medforge"
_HEAD = """# medforge

{description}.

    helm install medforge charts/medforge -n medforge --create-namespace -f charts/medforge/values-pilot.yaml

| values | for |
|---|---|
{files}

A site adds its own: `ci/site-values.yaml` shows which. Values that do not fit together are refused, each with what
mends it. NOTES, after the install, say which Secrets there have to be. Run with KServe ≥ 0.20 in Standard mode, and
where they are switched on KEDA, cert-manager, External Secrets, the Prometheus operator, the Gateway API.

## What it installs

| part | objects | where |
|---|---|---|
| gateway | Deployment, Service, claim | always |
| … for callers | Ingress with TLS, or HTTPRoute | `ingress`, `route` |
| … several of them | HorizontalPodAutoscaler; PodDisruptionBudget | `gateway.autoscaling`; `gateway.replicas` above 1 |
| predictors | ServingRuntime | unless `predictor.existingRuntime` |
| … stable | InferenceService; PodDisruptionBudget | `stable.release`; `predictor.minReplicas` above 1 |
| … canary | InferenceService | `medforge deploy`, or `canary` with `rollout.managedBy: helm` |
| … by load | what KServe makes for KEDA | `predictor.keda` |
| routing, reviewers' keys | ConfigMaps | always; unless `reviewers.existingConfigMap` |
| object store | Job that makes and tries the bucket | `objectStore.check` |
| … for a pilot | SeaweedFS: StatefulSet, Service | `seaweedfs` |
| secrets | ExternalSecrets | `objectStore.externalSecret`, `gatewayExternalSecret` |
| pipelines | ConfigMap kfp-launcher; Job that registers the recurring run | `pipelines.launcher`; `.schedule` |
| rights | Role of the rollout | `rollout.managedBy: medforge` |
| … where runs are | Roles: TrainJobs; keeping recurring runs | `pipelines.trainJobs`; `.schedule.multiUser` |
| network | NetworkPolicies: nothing is reached but what is named | `networkPolicy` |
| monitoring | ServiceMonitor, PodMonitor; PrometheusRule; dashboards | `monitoring.scrape`; `.rules`; `.dashboards` |
| `helm test` | a pod that asks the gateway | `tests.apiKeySecret` for a question too |

No pod has a token of the Kubernetes API; all keep Pod Security "restricted".

**What vLLM loads.** vLLM checks nothing. So before it `medforge verify-release` downloads the release, checks each
file's SHA-256 and the reviewers' signatures, and only then puts it where vLLM looks; without it the pod does not start.
It is an init container with the name of KServe's own storage initializer, which KServe leaves out where there is one.

**Kubeflow.** The runs' namespace (`pipelines.namespace`) needs the object store's Secret and, for the release pipeline,
the ConfigMap with the reviewers' keys. In a profile of a multi-user Kubeflow set `pipelines.schedule.multiUser`;
whoever installs must be allowed there what the Roles allow.

With Helm 4, which applies on the server's side, an upgrade that changes the predictor's arguments, or with vLLM the
data image, after a `medforge deploy` needs `--force-conflicts`: both have written the same field.

This file is written by `python charts/readme.py`.

## Values

| value | default | what |
|---|---|---|
"""


def described(text: str) -> list[tuple[str, Any, str]]:
    """Path, default and description of each value of a values.yaml, in its order. ValueError names one without."""
    root = yaml.safe_load(text)
    rows: list[tuple[str, Any, str]] = []
    path: list[tuple[int, str]] = []
    words: list[str] = []
    inside = -1  # the depth of a described block, whose own keys are its default
    for number, line in enumerate(text.splitlines(), 1):
        depth = len(line) - len(line.lstrip())
        if found := re.match(r"\s*# -- (.*)", line):
            words = [found[1]]
        elif words and (found := re.match(r"\s*# (.*)", line)):
            words.append(found[1])
        elif found := re.match(r"(\s*)([A-Za-z0-9_]+):(\s|$)", line):
            if inside >= 0 and depth > inside:
                continue
            path = [*((d, key) for d, key in path if d < depth), (depth, found[2])]
            names = [key for _, key in path]
            value = root
            for name in names:
                value = value[name]
            inside = depth if words else -1
            if words:
                rows.append((".".join(names), value, " ".join(words)))
            elif not (isinstance(value, dict) and value):
                raise ValueError(f"values.yaml, line {number}: {'.'.join(names)} has no description (# -- …)")
            words = []
        elif not line.strip():
            words = []
    return rows


def readme(chart: Path = CHART) -> str:
    """The text of README.md."""
    about = yaml.safe_load((chart / "Chart.yaml").read_text(encoding="utf-8"))
    files = "\n".join(f"| `{path.name}` | {_first_line(path)} |" for path in sorted(chart.glob("values-*.yaml")))
    rows = described((chart / "values.yaml").read_text(encoding="utf-8"))
    lines = [f"| `{path}` | {_default(value)} | {_cell(words)} |" for path, value, words in rows]
    return _HEAD.format(description=about["description"], files=files) + "\n".join(lines) + "\n"


def _first_line(path: Path) -> str:
    return path.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ").rstrip(".")


def _default(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return f"`{_cell(text)}`" if len(text) < 200 else "see values.yaml"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def main() -> int:
    """Write, or compare. Returns 1 if --check finds that README.md is not what it would be."""
    parser = argparse.ArgumentParser(description="Write the chart's README.md from the comments of its values.yaml.")
    parser.add_argument("--check", action="store_true", help="only say whether it is up to date")
    arguments = parser.parse_args()
    path, text = CHART / "README.md", readme()
    if arguments.check:
        current = path.read_text(encoding="utf-8") if path.is_file() else ""
        if current != text:
            print(f"{path} is not up to date: python charts/readme.py", file=sys.stderr)
        return int(current != text)
    path.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
