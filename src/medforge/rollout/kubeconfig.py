"""Where the Kubernetes API is and who we are to it: a pod's ServiceAccount, else the kubeconfig's current context."""

from __future__ import annotations

import base64
import binascii
import json
import os
import ssl
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
_EXEC_SECONDS = 60
_NOT_TAKEN = {
    "auth-provider", "username", "password", "as", "as-uid", "as-groups", "as-user-extra", "proxy-url",
    "tls-server-name",
}  # fmt: skip
_FILES = ("certificate-authority", "client-certificate", "client-key", "tokenFile")

Token = Callable[[], str]
"""Gives a bearer token that is valid now."""


@dataclass(frozen=True)
class Cluster:
    """An API server: its URL, the namespace that is meant where none is named, and what a request needs."""

    url: str
    namespace: str
    tls: ssl.SSLContext | None
    token: Token | None


def find(environment: Mapping[str, str], account: Path = ACCOUNT) -> Cluster:
    """The cluster that this process runs in, else that of KUBECONFIG or ~/.kube/config. ValueError without one."""
    host, port = environment.get("KUBERNETES_SERVICE_HOST"), environment.get("KUBERNETES_SERVICE_PORT", "443")
    if host and (account / "token").is_file():
        url = f"https://[{host}]:{port}" if ":" in host else f"https://{host}:{port}"
        tls = ssl.create_default_context(cafile=str(account / "ca.crt"))
        # read for each request: the kubelet renews it
        return Cluster(url, (account / "namespace").read_text().strip(), tls, lambda: _read(account / "token"))
    named = environment.get("KUBECONFIG", "")
    default = Path(environment.get("HOME", "/")) / ".kube" / "config"
    paths = [Path(text) for text in named.split(os.pathsep) if text] if named else [default]
    paths = [path for path in paths if path.is_file()]
    if not paths:
        raise ValueError(
            f"there is no cluster: this is no pod with a ServiceAccount, and {named or default} is no file; "
            "set KUBECONFIG"
        )
    return of_kubeconfig(paths)


def of_kubeconfig(paths: list[Path]) -> Cluster:
    """The cluster of the current context; where several files name the same thing the first one counts."""
    merged: dict[str, Any] = {"clusters": {}, "users": {}, "contexts": {}, "current-context": ""}
    for path in paths:
        document = _document(path)
        merged["current-context"] = merged["current-context"] or document.get("current-context") or ""
        for kind, field in (("clusters", "cluster"), ("users", "user"), ("contexts", "context")):
            for entry in document.get(kind) or []:
                merged[kind].setdefault(entry.get("name"), _absolute(entry.get(field) or {}, path.parent))
    where = ", ".join(map(str, paths))
    context = _named(merged, "contexts", merged["current-context"], where)
    cluster = _named(merged, "clusters", context.get("cluster"), where)
    user = _named(merged, "users", context.get("user"), where) if context.get("user") else {}
    if not cluster.get("server"):
        raise ValueError(f"{where}: the cluster {context.get('cluster')!r} has no server")
    if unknown := sorted(_NOT_TAKEN & ({*user} | {*cluster})):
        raise ValueError(
            f"{where}: {', '.join(unknown)} is not supported; a rollout takes a server without a proxy, and a "
            "token, a client certificate or exec"
        )
    url = str(cluster["server"]).rstrip("/")
    tls = _tls(cluster, user, where) if url.startswith("https://") else None
    return Cluster(url, context.get("namespace") or "default", tls, _token(user, where))


def _document(path: Path) -> dict[str, Any]:
    import yaml

    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: is no kubeconfig: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(document, dict):
        raise ValueError(f"{path}: is no kubeconfig")
    return document


def _absolute(entry: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Files are named from where the kubeconfig lies."""
    return entry | {name: str(folder / entry[name]) for name in _FILES if entry.get(name)}


def _named(merged: dict[str, Any], kind: str, name: Any, where: str) -> dict[str, Any]:
    if name not in merged[kind]:
        raise ValueError(f"{where}: names no {kind[:-1]} {name!r}; `kubectl config use-context` chooses one")
    found = merged[kind][name]
    assert isinstance(found, dict)
    return found


def _tls(cluster: dict[str, Any], user: dict[str, Any], where: str) -> ssl.SSLContext:
    if cluster.get("insecure-skip-tls-verify"):
        context = ssl._create_unverified_context()  # noqa: S323  as the kubeconfig says in so many words
    else:
        authority = _pem(cluster, "certificate-authority", where)
        context = ssl.create_default_context(cadata=authority or None)
    certificate, key = _pem(user, "client-certificate", where), _pem(user, "client-key", where)
    if bool(certificate) != bool(key):
        raise ValueError(f"{where}: client-certificate and client-key go together; one of them is missing")
    if certificate:
        with tempfile.TemporaryDirectory() as folder:  # for its owner only; the ssl module reads files
            path = Path(folder) / "both.pem"
            path.write_text(f"{certificate}\n{key}\n")
            context.load_cert_chain(path)
    return context


def _pem(entry: dict[str, Any], name: str, where: str) -> str:
    """The text of a certificate or key, that stands in the entry or in a file that it names; "" without one."""
    if data := entry.get(f"{name}-data"):
        try:
            return base64.b64decode(data, validate=True).decode()
        except (binascii.Error, UnicodeDecodeError):
            raise ValueError(f"{where}: {name}-data is not base64 of a PEM text") from None
    return _read(Path(entry[name])) if entry.get(name) else ""


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from None


def _token(user: dict[str, Any], where: str) -> Token | None:
    if user.get("exec"):
        if user["exec"].get("provideClusterInfo"):
            raise ValueError(f"{where}: exec.provideClusterInfo is not supported; use a token or a client certificate")
        return _Exec(user["exec"], where)
    if path := user.get("tokenFile"):
        return lambda: _read(Path(path))
    token = user.get("token")
    return (lambda: str(token)) if token else None


class _Exec:
    """A token from a program that the kubeconfig names (client.authentication.k8s.io), kept for one run's few minutes.

    Clouds hand out tokens in this way. https://kubernetes.io/docs/reference/access-authn-authz/authentication/
    """

    def __init__(self, settings: dict[str, Any], where: str) -> None:
        self._settings, self._where = settings, where
        self._kept: tuple[str, str] | None = None  # token, and when it expires

    def __call__(self) -> str:
        from datetime import datetime, timedelta, timezone

        soon = (datetime.now(timezone.utc) + timedelta(seconds=60)).strftime("%Y-%m-%dT%H:%M:%SZ")
        if self._kept is None or (self._kept[1] and self._kept[1] < soon):
            self._kept = self._ask()
        return self._kept[0]

    def _ask(self) -> tuple[str, str]:
        command = [str(self._settings["command"]), *map(str, self._settings.get("args") or [])]
        version = self._settings.get("apiVersion", "client.authentication.k8s.io/v1")
        info = {"apiVersion": version, "kind": "ExecCredential", "spec": {"interactive": False}}
        given = {entry["name"]: entry["value"] for entry in self._settings.get("env") or []}
        environment = os.environ | given | {"KUBERNETES_EXEC_INFO": json.dumps(info)}
        try:
            ended = subprocess.run(  # noqa: S603  the operator's own kubeconfig names it
                command, env=environment, capture_output=True, text=True, timeout=_EXEC_SECONDS, check=True
            )
            status = json.loads(ended.stdout)["status"]
            return str(status["token"]), str(status.get("expirationTimestamp") or "")
        except subprocess.CalledProcessError as error:
            why = " ".join(error.stderr.split())[-300:] or f"exit status {error.returncode}"
        except (OSError, subprocess.TimeoutExpired, ValueError, LookupError, TypeError) as error:
            why = f"{type(error).__name__}: {error}"
        raise ValueError(f"{self._where}: {command[0]} gave no token ({why})")
