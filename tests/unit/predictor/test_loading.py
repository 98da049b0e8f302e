"""From a folder to a loaded release, or one line that says why not."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Any

import pytest

from medforge.files import canonical_json, list_files, sha256_bytes, sha256_file, write_json
from medforge.models.heads import TaskHeads, save_heads
from medforge.release.sign import new_key
from serving.predictor.__main__ import _NoPayload, main, parser
from serving.predictor.generation import Generation
from serving.predictor.loading import load, obtain, own_dtype, warm_up
from tests.unit.predictor.conftest import PIXELS
from tests.unit.predictor.examples import planes

ABOUT = {"name": "unit", "code_version": "0.1.0+abc", "min_pixels": PIXELS[0], "max_pixels": PIXELS[1]}


def make_release(folder: Path, model: Path, about: dict[str, Any] = ABOUT, heads: TaskHeads | None = None) -> Path:
    """An unsigned release of a model folder."""
    (folder / "model").mkdir(parents=True)
    for name in list_files(model):
        (folder / "model" / name).write_bytes((model / name).read_bytes())
    if heads is not None:
        save_heads(heads, folder / "model")
    write_json(folder / "verdict.json", {"passed": True})
    table = {n: {"sha256": sha256_file(folder / n), "size": (folder / n).stat().st_size} for n in list_files(folder)}
    (folder / "manifest.json").write_bytes(canonical_json({"schema_version": 1, "files": table, "about": about}))
    return folder


@pytest.fixture
def release(tmp_path: Path, base: Path) -> Path:
    return make_release(tmp_path / "release", base, heads=TaskHeads(128, region=True, match=False))


def taken(place: Path | str, work: Path, **options: Any) -> Any:
    return obtain(str(place), **({"digest": None, "trusted": [], "allow_unsigned": True, "work": work} | options))


def test_a_candidate_is_loaded_with_its_heads(release: Path, tmp_path: Path) -> None:
    loaded = load(taken(release, tmp_path))
    generation = loaded.generation
    assert generation.heads is not None and not generation.heads.training and not generation.model.training
    entry = loaded.entry(["region"], 4096)
    digest = sha256_bytes((release / "manifest.json").read_bytes())
    assert entry == {
        "max_model_len": 4096,
        "medforge": {
            "release": digest,
            "version": "unit 0.1.0+abc",
            "heads": ["region"],
            "family": "qwen3-vl",
            "min_pixels": PIXELS[0],
            "max_pixels": PIXELS[1],
            "about": ABOUT,
        },
    }

    async def warm(generation: Generation) -> None:
        async with planes(generation) as plane:
            warm_up(plane)

    asyncio.run(warm(generation))
    generation.model.lm_head = None  # what would fail at the first request fails before it
    with pytest.raises(Exception):  # noqa: B017
        asyncio.run(warm(generation))


def test_without_a_trusted_approval_nothing_is_served(release: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--trusted"):
        taken(release, tmp_path, allow_unsigned=False)
    new_key(tmp_path / "key")
    with pytest.raises(ValueError, match="nobody has approved it"):
        taken(release, tmp_path, allow_unsigned=False, trusted=[tmp_path / "key.pub"])
    with pytest.raises(ValueError, match="is not a public key"):
        taken(release, tmp_path, trusted=[tmp_path / "key"])


def test_the_digest_is_asked_for_or_read_from_the_place(release: Path, tmp_path: Path) -> None:
    digest = sha256_bytes((release / "manifest.json").read_bytes())
    assert taken(release, tmp_path, digest=digest).digest == digest
    right = release.rename(release.with_name(digest))
    assert taken(f"{right}/", tmp_path).digest == digest
    wrong = right.rename(right.with_name("0" * 64))
    with pytest.raises(ValueError, match="is not of release 0000"):
        taken(wrong, tmp_path)


def test_places_that_are_none_are_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such folder"):
        taken(tmp_path / "nothing", tmp_path)
    with pytest.raises(ValueError, match="s3:// only"):
        taken("https://example.org/x", tmp_path)


@pytest.mark.parametrize("about", [{}, ABOUT | {"min_pixels": "3136"}, ABOUT | {"min_pixels": 10**9}])
def test_a_release_has_to_tell_its_pixels(base: Path, tmp_path: Path, about: dict[str, Any]) -> None:
    release = make_release(tmp_path / "release", base, about)
    with pytest.raises(ValueError, match="min_pixels"):
        load(taken(release, tmp_path))


def test_heads_of_another_model_are_refused(base: Path, tmp_path: Path) -> None:
    release = make_release(tmp_path / "release", base, heads=TaskHeads(64, region=True, match=True))
    with pytest.raises(ValueError, match="hidden size 64"):
        load(taken(release, tmp_path))


def test_the_precision_is_the_models_own(base: Path, tmp_path: Path) -> None:
    assert own_dtype(base) == "float32"
    for config, expected in (
        ({}, "float32"),
        ({"dtype": "bfloat16"}, "bfloat16"),
        ({"torch_dtype": "float16"}, "float16"),
        ({"text_config": {"dtype": "bfloat16"}}, "bfloat16"),
    ):
        write_json(tmp_path / "config.json", config)
        assert own_dtype(tmp_path) == expected
    write_json(tmp_path / "config.json", {"dtype": "int8"})
    with pytest.raises(ValueError, match="int8"):
        own_dtype(tmp_path)


def test_the_model_can_be_loaded_in_another_precision(release: Path, tmp_path: Path) -> None:
    import torch

    loaded = load(taken(release, tmp_path), "bfloat16")
    assert loaded.generation.model.dtype == torch.bfloat16


def test_the_log_does_not_hold_what_an_exception_says(caplog: pytest.LogCaptureFixture) -> None:
    quiet = _NoPayload()
    with caplog.at_level(logging.ERROR):
        try:
            raise KeyError("Jane Doe")
        except KeyError:
            logging.getLogger("x").exception("for %s", "Jane Doe")
    (record,) = caplog.records
    assert quiet.filter(record)
    told = logging.Formatter().format(record)
    assert told.startswith("KeyError at ") and "Jane" not in told
    plain = logging.LogRecord("x", logging.INFO, "", 1, "a %s", ("b",), None)
    assert quiet.filter(plain) and plain.getMessage() == "a b"


def test_the_command_line_names_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in ((), ("--model-dir", "x", "--max-batch", "0"), ("--model-dir", "x", "--http_port", "web")):
        with pytest.raises(SystemExit) as ended:
            main(words)
        assert ended.value.code == 2
    assert "--http_port" in capsys.readouterr().err
    options = parser().parse_args(["--model_dir", "d", "--trusted", "a", "b", "--trusted", "c", "--timeout", "0.5"])
    assert options.trusted == [Path("a"), Path("b"), Path("c")] and options.timeout == 0.5
