"""From a folder or an address of the object store to a release that is proved, approved, loaded and warm."""

from __future__ import annotations

import io
import logging
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medforge.files import read_json
from medforge.models.encode import Encoder
from medforge.models.heads import load_heads
from medforge.models.load import load_model
from medforge.records import IMAGE_MARK, Turn
from medforge.release.sign import load_public_key
from medforge.release.verify import Verified, require_approval, verify_folder
from serving.predictor.generation import Done, Generation, Request
from serving.predictor.plane import Ask, Plane

log = logging.getLogger(__name__)

DTYPES = ("float32", "bfloat16", "float16")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_DOWNLOAD = "import sys; from kserve_storage import Storage; Storage.download(sys.argv[1], sys.argv[2])"


@dataclass(frozen=True)
class Pixels:
    """To how many pixels images are enlarged or reduced: as in training."""

    least: int
    most: int


@dataclass(frozen=True)
class Loaded:
    """A release in memory."""

    release: Verified
    generation: Generation
    pixels: Pixels

    @property
    def version(self) -> str:
        """The release's name and the version of the code that made it."""
        about = self.release.manifest["about"]
        return f"{about.get('name', 'unnamed')} {about.get('code_version', 'unknown')}"

    def entry(self, heads: Sequence[str], context: int) -> dict[str, Any]:
        """What /openai/v1/models tells beside the name: the extension that the gateway looks for."""
        extension = {
            "release": self.release.digest,
            "version": self.version,
            "heads": list(heads),
            "family": self.generation.encoder.family.name,
            "min_pixels": self.pixels.least,
            "max_pixels": self.pixels.most,
            "about": self.release.manifest["about"],
        }
        return {"max_model_len": context, "medforge": extension}


def obtain(place: str, digest: str | None, trusted: Sequence[Path], allow_unsigned: bool, work: Path) -> Verified:
    """The release at `place`, a folder or s3://bucket/releases/<digest>/, which is downloaded to the folder `work`.

    Without `digest`, one that the place ends in has to be the release's. Raises ValueError when it cannot be had, is
    not whole, or is not approved by a key in the files `trusted`.
    """
    keys = [load_public_key(path) for path in trusted]
    if not keys and not allow_unsigned:
        raise ValueError("no public key is trusted: give reviewers' keys with --trusted, or --allow-unsigned")
    named = place.rstrip("/").rpartition("/")[2]
    expected = digest or (named if _DIGEST.fullmatch(named) else None)
    folder = _download(place, work) if "://" in place else Path(place)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; a release is expected, or its address as s3://…")
    release = verify_folder(folder, keys, expected)
    require_approval(release, allow_unsigned)
    return release


def _download(address: str, work: Path) -> Path:
    if not address.startswith("s3://"):
        raise ValueError(f"{address}: releases are downloaded from s3:// only")
    target = Path(tempfile.mkdtemp(dir=work, prefix="release-"))
    # without the slash a prefix also brings what only begins like it
    command = [sys.executable, "-c", _DOWNLOAD, f"{address.rstrip('/')}/", str(target)]
    # It forks a pool, and ends it by SIGTERM: with our handler of SIGTERM such a child can miss it, and both wait
    # for ever. So it gets a process of its own, with its own group.
    process = subprocess.Popen(  # noqa: S603  our own program
        command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        _, told = process.communicate()
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise
    if process.returncode:
        reason = " ".join((told.strip().splitlines() or [f"ended with {process.returncode}"])[-1].split())[:300]
        raise ValueError(f"{address}: cannot be downloaded: {reason}; check AWS_ENDPOINT_URL and the keys")
    return target


def load(release: Verified, dtype: str | None = None) -> Loaded:
    """The model of a release with its heads, on the GPU where there is one, in `dtype` or in its own.

    Raises ValueError when its parts are missing or do not fit together.
    """
    about = release.manifest["about"]
    least, most = about.get("min_pixels"), about.get("max_pixels")
    if type(least) is not int or type(most) is not int or not 1 <= least <= most:
        raise ValueError(f"{release.folder}: its manifest tells no min_pixels and max_pixels; publish it with medforge")
    if not release.model.is_dir():
        raise ValueError(f"{release.folder}: holds no model")
    encoder = Encoder(release.model, least, most)
    heads = load_heads(release.model)
    model = load_model(release.model, dtype or own_dtype(release.model)).eval()
    hidden = model.config.get_text_config().hidden_size
    if heads is not None:
        if heads.hidden != hidden:
            raise ValueError(f"{release.model}: its heads are of hidden size {heads.hidden}, its model of {hidden}")
        heads = heads.to(model.device).eval()
    return Loaded(release, Generation(model, encoder, heads), Pixels(least, most))


def own_dtype(folder: Path) -> str:
    """The precision that a model's config.json names, float32 where it names none. ValueError for another one."""
    config = read_json(folder / "config.json")
    text = config.get("text_config") or {}
    names = (config.get("dtype"), config.get("torch_dtype"), text.get("dtype"), text.get("torch_dtype"))
    found = next((str(name).removeprefix("torch.") for name in names if name), "float32")
    if found not in DTYPES:
        raise ValueError(f"{folder / 'config.json'}: dtype {found!r} is not one of {', '.join(DTYPES)}; give --dtype")
    return found


def warm_up(plane: Plane) -> None:
    """Answer one question about a grey image, with all heads: what would fail later fails now. Raises what fails."""
    from PIL import Image

    stream = io.BytesIO()
    Image.new("RGB", (64, 64), (127, 127, 127)).save(stream, "PNG")
    heads = plane.heads
    ask = Ask(
        turns=(Turn("user", f"{IMAGE_MARK}What is shown?"),),
        images=(stream.getvalue(),),
        max_tokens=2,
        region="region" in heads,
        match="match" in heads,
        claim="nothing" if "match" in heads else None,
    )
    job = plane.prepare(ask)
    ended: list[Any] = []
    plane.generation.run([Request(job)], lambda events: ended.extend(e for _, e in events if isinstance(e, Done)))
    if len(ended) != 1 or (ended[0].region is None) == ask.region or (ended[0].match is None) == ask.match:
        raise ValueError("the model does not answer as it should: the warm-up gave no whole answer")
