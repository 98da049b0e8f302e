"""The MinIO SDK for any S3 endpoint: what the environment says about it, a client, and its errors in plain words."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from minio import Minio

_ADDRESS = "MEDFORGE_S3_ENDPOINT and MEDFORGE_S3_SECURE"


class Entry(NamedTuple):
    """One object of a listing: key, size in bytes, the server's ETag (which proves nothing) and time of writing."""

    key: str
    size: int
    etag: str
    modified: str = ""


def entry_of(item: Any) -> Entry:
    """The entry of an object as the SDK lists it."""
    modified = item.last_modified.isoformat() if item.last_modified else ""
    return Entry(str(item.object_name), item.size or 0, item.etag or "", modified)


def is_configured(environment: Mapping[str, str] | None = None) -> bool:
    """Whether the environment names an object store; ValueError names what is missing when it does so by half."""
    values = os.environ if environment is None else environment
    names = ("MEDFORGE_S3_ENDPOINT", "MEDFORGE_S3_ACCESS_KEY", "MEDFORGE_S3_SECRET_KEY")
    missing = [name for name in names if not values.get(name)]
    if missing and len(missing) < len(names):
        there = [name for name in names if name not in missing]
        raise ValueError(
            f"{' and '.join(there)} {'is' if len(there) == 1 else 'are'} set but {' and '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} not: set all three, or none for the embedded store"
        )
    return not missing


def read_endpoint(text: str, secure: str) -> tuple[str, bool]:
    """host:port and whether it is https, from MEDFORGE_S3_ENDPOINT and MEDFORGE_S3_SECURE."""
    if secure.lower() not in ("", "true", "false"):
        raise ValueError(f"MEDFORGE_S3_SECURE is {secure!r}; write true or false")
    if "@" in text:  # not shown: it may be a password
        raise ValueError("MEDFORGE_S3_ENDPOINT holds a user or password; set the keys' own variables instead")
    shape = re.fullmatch(r"(?:(https?)://)?([A-Za-z0-9._-]+(?::[0-9]{1,5})?|\[[0-9a-fA-F:]+\](?::[0-9]{1,5})?)/?", text)
    if not shape:
        raise ValueError(f"MEDFORGE_S3_ENDPOINT is {text!r}; write host:port, http://host:port or https://host:port")
    scheme, host = shape[1] or "", shape[2]
    if scheme and secure and (scheme == "https") != (secure.lower() == "true"):
        raise ValueError(f"MEDFORGE_S3_ENDPOINT is {text!r} but MEDFORGE_S3_SECURE is {secure!r}: they disagree")
    return host, secure.lower() == "true" if secure else scheme == "https"


def open_client(endpoint: str, access_key: str, secret_key: str, region: str, secure: bool) -> Minio:
    """A client for host:port. Nothing is sent yet."""
    import certifi
    from minio import Minio
    from urllib3 import Retry, Timeout

    http_client = _http_client()(
        maxsize=16,
        timeout=Timeout(connect=5, read=30),
        # A server that is not there is told after two tries; one that stumbles is given a little time.
        retries=Retry(total=3, connect=1, read=1, backoff_factor=0.2, status_forcelist=[500, 502, 503, 504]),
        cert_reqs="CERT_REQUIRED",
        ca_certs=os.environ.get("SSL_CERT_FILE") or certifi.where(),
    )
    return Minio(
        endpoint=endpoint,
        access_key=access_key,
        secret_key=secret_key,
        region=region,  # without it the SDK asks for the bucket's location first, which not every server tells
        secure=secure,
        http_client=http_client,
    )


def _http_client() -> type[Any]:
    """urllib3's client, which calls an S3 server's `text/xml` by the name that the SDK insists on."""
    import urllib3

    class Client(urllib3.PoolManager):
        def urlopen(self, *args: Any, **options: Any) -> Any:
            response = super().urlopen(*args, **options)
            if response.headers.get("content-type", "").startswith("text/xml"):
                response.headers["content-type"] = "application/xml"
            return response

    return Client


@contextmanager
def explained(url: str, bucket: str = "", key: str = "") -> Iterator[None]:
    """Turn the SDK's errors into a ValueError of one sentence that says what to do, and never shows the secret."""
    from xml.etree.ElementTree import ParseError

    from minio.error import InvalidResponseError, S3Error, ServerError
    from urllib3.exceptions import HTTPError

    where = f"s3://{bucket}/{key}" if key else f"s3://{bucket}" if bucket else url
    try:
        yield
    except S3Error as error:
        raise ValueError(_why(error, where, bucket, url)) from None
    except (InvalidResponseError, ServerError, ParseError) as error:
        short = " ".join(str(error).split())[:200]
        raise ValueError(f"{url}: does not answer as an S3 server does ({short}); see {_ADDRESS}") from None
    except HTTPError as error:
        reason = getattr(error, "reason", None) or error
        short = re.sub(r"^HTTPS?Connection\([^)]*\): ", "", " ".join(str(reason).split()))[:200]
        raise ValueError(
            f"{url}: the object store cannot be reached ({short}); is it running? see {_ADDRESS}"
        ) from None


def _why(error: Any, where: str, bucket: str, url: str) -> str:
    if error.code in ("AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch"):
        return (
            f"{where}: the object store refuses the keys ({error.code}): check MEDFORGE_S3_ACCESS_KEY and "
            "MEDFORGE_S3_SECRET_KEY, and what they are allowed to do"
        )
    if error.code == "NoSuchBucket":
        return f"{where}: there is no bucket {bucket!r} at {url}; `medforge store ls` lists the buckets"
    if error.code in ("NoSuchKey", "ResourceNotFound"):
        return f"{where}: there is no such object at {url}"
    return f"{where}: {url} answers {error.code}: {error.message}"
