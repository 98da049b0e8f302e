"""The Kubeflow Pipelines API through its own client: who we are to it, time limits, and its errors in plain words.

    KF_PIPELINES_ENDPOINT        URL of the API, such as https://kubeflow.example.org/pipeline
    KF_PIPELINES_NAMESPACE       namespace (profile) of the runs
    KF_PIPELINES_SA_TOKEN_PATH   file with a ServiceAccount's token, which the kubelet renews; or
    KF_PIPELINES_TOKEN           a bearer token; or
    KF_PIPELINES_COOKIE          the cookie of a login, such as authservice_session=…
    KF_PIPELINES_CA_CERT         file with the certificates of a private authority

In a pod, the token that Kubeflow mounts is found without KF_PIPELINES_SA_TOKEN_PATH.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

MOUNTED_TOKEN = Path("/var/run/secrets/kubeflow/pipelines/token")
SECONDS = (5.0, 60.0)  # to connect, and to wait for an answer
_WAYS = ("KF_PIPELINES_SA_TOKEN_PATH", "KF_PIPELINES_TOKEN", "KF_PIPELINES_COOKIE")
_PAGE = 100


class KubeflowError(ValueError):
    """The API refused a request, or could not be asked (status 0)."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status

    @property
    def passing(self) -> bool:
        """Whether it may be gone by the next try."""
        return self.status in (0, 429) or self.status >= 500


class Kubeflow:
    """The pipelines, runs and recurring runs of one namespace. `client` is the `kfp.Client`."""

    def __init__(self, client: Any, endpoint: str, namespace: str) -> None:
        self.client, self.endpoint, self.namespace = client, endpoint, namespace

    @classmethod
    def connect(cls, environment: Mapping[str, str]) -> Kubeflow:
        """By the variables above. Nothing is sent yet. ValueError names the variable that is missing or wrong."""
        endpoint = environment.get("KF_PIPELINES_ENDPOINT", "").rstrip("/")
        namespace = environment.get("KF_PIPELINES_NAMESPACE", "")
        if not endpoint.startswith(("http://", "https://")):
            raise ValueError(
                f"KF_PIPELINES_ENDPOINT is {endpoint!r}; the URL of the API is needed, such as "
                "https://kubeflow.example.org/pipeline"
            )
        if not namespace:
            raise ValueError("KF_PIPELINES_NAMESPACE is not set; name the namespace (profile) of the runs")
        return cls(_client(endpoint, namespace, environment), endpoint, namespace)

    def ask(self, what: str, call: Callable[..., Any], *given: Any, **named: Any) -> Any:
        """What the call returns. KubeflowError with `what` was asked when it fails."""
        import kfp_server_api
        from urllib3.exceptions import HTTPError

        try:
            with contextlib.redirect_stdout(io.StringIO()):  # the client prints links of its own
                return call(*given, **named)
        except kfp_server_api.ApiException as error:
            raise KubeflowError(int(error.status or 0), f"{what}: {self._why(error)}") from None
        except HTTPError as error:
            why = " ".join(str(getattr(error, "reason", None) or error).split())
            why = why.partition("object at 0x")[2].partition(">: ")[2] or why  # urllib3 tells its own address
            raise KubeflowError(0, f"{what}: {self.endpoint} cannot be reached ({why[:200]})") from None

    def _why(self, error: Any) -> str:
        if not error.status:
            return f"{self.endpoint} cannot be reached ({' '.join(str(error.reason).split())[:200]})"
        message = _message(error.body) or str(error.reason)
        mend = {
            401: "the token or cookie is not valid (any more)",
            403: f"this account has no right to it in the namespace {self.namespace}",
            404: f"is {self.endpoint} the API's URL?",
        }.get(error.status)
        return f"{self.endpoint} answers {error.status}: {message}{f'; {mend}' if mend else ''}"

    def all(self, what: str, listing: Callable[..., Any], field: str, **named: Any) -> Iterator[Any]:
        """Each item of a listing, over all its pages."""
        token = ""
        while True:
            page = self.ask(what, listing, page_token=token, page_size=_PAGE, **named)
            yield from getattr(page, field) or []
            token = page.next_page_token or ""
            if not token:
                return

    def link(self, kind: str, name: str) -> str:
        """The page of a run, pipeline or recurring run."""
        return f"{self.client._get_url_prefix().rstrip('/')}/#/{kind}/details/{name}"


def named(name: str) -> str:
    """A filter of a listing: the items of that name."""
    return json.dumps({"predicates": [{"operation": "EQUALS", "key": "display_name", "stringValue": name}]})


def _client(endpoint: str, namespace: str, environment: Mapping[str, str]) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import kfp
        from kfp.client import ServiceAccountTokenVolumeCredentials

        given = [name for name in _WAYS if environment.get(name)]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} are set; one of them says who we are: unset the others")
        path = environment.get("KF_PIPELINES_SA_TOKEN_PATH", "")
        if path and not Path(path).is_file():
            raise ValueError(f"KF_PIPELINES_SA_TOKEN_PATH: {path}: no such file")
        if not given and MOUNTED_TOKEN.is_file():
            path = str(MOUNTED_TOKEN)
        token, cookie = (environment.get(name, "").strip() for name in _WAYS[1:])
        authority = environment.get("KF_PIPELINES_CA_CERT") or None
        if authority and not Path(authority).is_file():
            raise ValueError(f"KF_PIPELINES_CA_CERT: {authority}: no such file")

        class Token(ServiceAccountTokenVolumeCredentials):
            """Read again for each request, as the kubelet renews it."""

            def _get_token(self) -> str:
                return _sound("KF_PIPELINES_SA_TOKEN_PATH", Path(path).read_text(encoding="utf-8"))

        class Client(kfp.Client):
            """The environment alone decides; the kfp library would also read and write a file at home."""

            def _load_context_setting_or_default(self) -> None:
                self._context_setting = {"namespace": namespace}

        client = Client(
            host=endpoint,
            namespace=namespace,
            existing_token=_sound("KF_PIPELINES_TOKEN", token) if token else None,
            cookies=cookie if cookie else None,
            credentials=Token(path) if path else None,
            ssl_ca_cert=authority,
        )
    for api in (client._run_api, client._recurring_run_api, client._experiment_api, client._pipelines_api):
        _guard(api.api_client.rest_client, endpoint)
    _guard(client._upload_api.api_client.rest_client, endpoint)
    return client


def _sound(variable: str, token: str) -> str:
    """The token without the line's end that files have. ValueError, which does not show it, for what is none."""
    token = token.strip()
    if not re.fullmatch(r"[!-~]+", token):
        raise ValueError(f"{variable}: {'has a space or line break in it' if token else 'is empty'}; a token is needed")
    return token


def _guard(rest: Any, endpoint: str) -> None:
    """Give each request a time limit; refuse an answer that is no JSON, which the library takes for an empty one."""
    if getattr(rest, "guarded", False):
        return
    request = rest.request

    def guarded(*given: Any, **options: Any) -> Any:
        options["_request_timeout"] = options.get("_request_timeout") or SECONDS
        answer = request(*given, **options)
        try:
            json.loads(answer.data)
        except ValueError:
            raise KubeflowError(
                answer.status,
                f"{endpoint} answers with something else than JSON, such as a login page: is it the API's URL, and is "
                f"one of {', '.join(_WAYS)} set?",
            ) from None
        return answer

    rest.request, rest.guarded = guarded, True


def _message(body: Any) -> str:
    """The words of an error's body, which is JSON of the API or a page of a proxy."""
    text = body.decode(errors="replace") if isinstance(body, bytes) else str(body or "")
    with contextlib.suppress(ValueError):
        value = json.loads(text)
        if isinstance(value, dict):
            text = str(value.get("error_message") or value.get("message") or value.get("error") or text)
    return " ".join(text.split())[:300]
