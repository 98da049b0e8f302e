"""Where the cluster is: a pod's account, kubeconfigs, tokens from programs."""

from __future__ import annotations

import base64
import json
import sys
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest

from medforge.rollout.kubeconfig import find


def kubeconfig(path: Path, cluster: dict[str, Any] | None = None, user: dict[str, Any] | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    document = {
        "current-context": "here",
        "contexts": [{"name": "here", "context": {"cluster": "c", "user": "u", "namespace": "med"}}],
        "clusters": [{"name": "c", "cluster": {"server": "http://api:8080/", **(cluster or {})}}],
        "users": [{"name": "u", "user": user or {}}],
    }
    path.write_text(json.dumps(document))
    return path


def certificate() -> tuple[bytes, bytes]:
    """A self-signed certificate and its key, PEM."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "test")])
    now = datetime.now(timezone.utc)
    made = (
        x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
        .serial_number(1).not_valid_before(now).not_valid_after(now + timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )  # fmt: skip
    pem = serialization.Encoding.PEM
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return made.public_bytes(pem), private


def test_a_pod_has_an_account_whose_token_is_renewed(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("first\n")
    (tmp_path / "namespace").write_text("med")
    (tmp_path / "ca.crt").write_bytes(certificate()[0])
    found = find({"KUBERNETES_SERVICE_HOST": "fd00::1", "KUBERNETES_SERVICE_PORT": "443"}, tmp_path)
    assert (found.url, found.namespace) == ("https://[fd00::1]:443", "med")
    assert found.tls is not None and len(found.tls.get_ca_certs()) == 1
    assert found.token is not None and found.token() == "first"
    (tmp_path / "token").write_text("second\n")
    assert found.token() == "second"


def test_the_current_context_counts_and_the_first_of_several_files(tmp_path: Path) -> None:
    first = kubeconfig(tmp_path / "a", user={"token": "one"})
    second = kubeconfig(tmp_path / "b", cluster={"server": "http://other"}, user={"token": "two"})
    found = find({"KUBECONFIG": f"{first}:{second}:{tmp_path / 'none'}"}, tmp_path)
    assert (found.url, found.namespace, found.tls) == ("http://api:8080", "med", None)
    assert found.token is not None and found.token() == "one"
    home = kubeconfig(tmp_path / ".kube" / "config")
    assert find({"HOME": str(home.parent.parent)}, tmp_path).token is None


def test_certificates_stand_in_it_or_beside_it(tmp_path: Path) -> None:
    public, private = certificate()
    (tmp_path / "ca.pem").write_bytes(public)
    (tmp_path / "token").write_text("t\n")
    encoded = {
        "client-certificate-data": base64.b64encode(public).decode(),
        "client-key-data": base64.b64encode(private).decode(),
        "tokenFile": "token",
    }
    cluster = {"server": "https://api", "certificate-authority": "ca.pem"}
    found = find({"KUBECONFIG": str(kubeconfig(tmp_path / "config", cluster, encoded))}, tmp_path)
    assert found.tls is not None and len(found.tls.get_ca_certs()) == 1
    assert found.token is not None and found.token() == "t"


def test_a_program_gives_a_token_which_is_kept_while_it_is_valid(tmp_path: Path) -> None:
    count = tmp_path / "count"
    code = (
        "import json, os, pathlib, sys\n"
        f"path = pathlib.Path({str(count)!r})\n"
        "number = int(path.read_text()) + 1 if path.exists() else 1\n"
        "path.write_text(str(number))\n"
        "assert json.loads(os.environ['KUBERNETES_EXEC_INFO'])['kind'] == 'ExecCredential'\n"
        "until = '2000-01-01T00:00:00Z' if number == 1 else '2999-01-01T00:00:00Z'\n"
        "status = {'token': os.environ['PRE'] + str(number), 'expirationTimestamp': until}\n"
        "print(json.dumps({'status': status}))\n"
    )
    program = {"command": sys.executable, "args": ["-c", code], "env": [{"name": "PRE", "value": "t"}]}
    found = find({"KUBECONFIG": str(kubeconfig(tmp_path / "config", user={"exec": program}))}, tmp_path)
    assert found.token is not None
    assert [found.token() for _ in range(4)] == ["t1", "t2", "t2", "t2"]


@pytest.mark.parametrize(
    ("user", "told"),
    [
        ({"exec": {"command": "no-such-program"}}, "no-such-program gave no token"),
        ({"exec": {"command": sys.executable, "args": ["-c", "print(1)"]}}, "gave no token"),
        ({"exec": {"command": sys.executable, "args": ["-c", "import sys; sys.exit('log in first')"]}}, "log in first"),
        ({"username": "u", "password": "secret"}, "password, username is not supported"),
        ({"auth-provider": {"name": "gcp"}}, "auth-provider is not supported"),
        ({"tokenFile": "none"}, "none: cannot be read"),
        ({"token": "t", "as": "root"}, "as is not supported"),
        ({"exec": {"command": "x", "provideClusterInfo": True}}, "provideClusterInfo is not supported"),
    ],
)
def test_who_cannot_be_told_is_told_why(tmp_path: Path, user: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told) as caught:
        found = find({"KUBECONFIG": str(kubeconfig(tmp_path / "config", user=user))}, tmp_path)
        assert found.token is not None
        found.token()
    assert "secret" not in str(caught.value)


def test_a_kubeconfig_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no cluster"):
        find({"HOME": str(tmp_path)}, tmp_path)
    for text, told in (("- 1", "is no kubeconfig"), ("{", "is no kubeconfig"), ("{}", "names no context")):
        (tmp_path / "config").write_text(text)
        with pytest.raises(ValueError, match=told):
            find({"KUBECONFIG": str(tmp_path / "config")}, tmp_path)
    for field in ("proxy-url", "tls-server-name"):
        with pytest.raises(ValueError, match=f"{field} is not supported"):
            find({"KUBECONFIG": str(kubeconfig(tmp_path / "config", {"server": "https://x", field: "y"}))}, tmp_path)
    cluster = {"server": "https://x"}
    for field in ("client-certificate-data", "client-key-data"):
        with pytest.raises(ValueError, match="client-certificate and client-key go together"):
            find({"KUBECONFIG": str(kubeconfig(tmp_path / "config", cluster, {field: "eHg="}))}, tmp_path)
    with pytest.raises(ValueError, match="certificate-authority-data is not base64"):
        cluster = {"server": "https://x", "certificate-authority-data": "!!"}
        find({"KUBECONFIG": str(kubeconfig(tmp_path / "config", cluster))}, tmp_path)
