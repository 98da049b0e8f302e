"""The page's files, their policy, their colours and words; how they are served; the preview of an image."""

from __future__ import annotations

import http.client
import io
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from PIL import Image

from serving.gateway import page
from tests.conftest import png
from tests.integration.serving.page_server import KEY, PageServer

FILES = {path.name: path.read_text(encoding="utf-8") for path in sorted(page.FOLDER.iterdir())}
SCRIPTS = {name: text for name, text in FILES.items() if name.endswith(".js")}
HTML = FILES["index.html"]

Answer = tuple[int, dict[str, str], bytes]


def strings(language: str) -> dict[str, str]:
    block = re.search(rf"\n  {language}: \{{(.*?)\n  \}},", FILES["strings.js"], re.DOTALL)
    assert block
    rows = re.findall(r'^    ("[\w-]+"): (".*"),$', block[1], re.MULTILINE)
    assert len(rows) == len([line for line in block[1].splitlines() if line.strip()]), "every line is a string"
    return {json.loads(name): json.loads(text) for name, text in rows}


# ---------------------------------------------------------------- files


def test_nothing_comes_from_elsewhere_and_nothing_runs_inline() -> None:
    for name, text in FILES.items():
        urls = set(re.findall(r"https?://[^\s\"')]+", text)) - {"http://www.w3.org/2000/svg"}
        assert urls == set(), name
        assert not re.search(r"@import|url\(|importScripts|eval\(|new Function", text), name
    assert not re.search(r"<style|\sstyle=|\son\w+=|javascript:", HTML)
    assert all(re.search(r'src="page/', tag) for tag in re.findall(r"<script[^>]*>", HTML))
    sinks = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|srcdoc|DOMParser|setAttribute\(\"style"
    assert {name for name, text in SCRIPTS.items() if re.search(sinks, text)} == set()


def test_every_module_file_and_element_that_is_named_is_there() -> None:
    for name, text in SCRIPTS.items():
        assert set(re.findall(r'from "\./([\w.]+)"', text)) <= set(FILES), name
        ids = set(re.findall(r'find\("([\w-]+)"\)', text)) - {"kept", "provisional", "provisional-text"}
        assert ids <= set(re.findall(r'\sid="([\w-]+)"', HTML)), name
    assert set(re.findall(r'(?:href|src)="page/([\w.]+)"', HTML)) <= set(FILES)
    icons = set(re.findall(r'#(i-\w+)"', HTML)) | {
        f"i-{name}" for text in SCRIPTS.values() for name in re.findall(r'icon\("(\w+)"\)', text)
    }
    assert icons <= set(re.findall(r'<symbol id="([\w-]+)"', HTML))


def test_both_languages_say_the_same_things() -> None:
    english, chinese = strings("en"), strings("zh")
    assert list(english) == list(chinese)
    for name, text in english.items():
        assert sorted(re.findall(r"\{\w+\}", text)) == sorted(re.findall(r"\{\w+\}", chinese[name])), name
        if name not in ("request",):
            assert re.search(r"[\u4e00-\u9fff{]", chinese[name]), f"{name} is not Chinese"


def test_every_word_that_is_said_has_a_string_and_every_string_is_said() -> None:
    known = set(strings("en"))
    said = set(re.findall(r'data-(?:text|label|name)="([\w-]+)"', HTML))
    prefixes = set()
    for name, text in SCRIPTS.items():
        if name == "strings.js":
            continue
        said |= set(re.findall(r'say\(\s*"([\w-]+)"', text))
        prefixes |= set(re.findall(r"`([a-z]+-)\$\{", text))
        said |= {word for word in re.findall(r'"([\w-]+)"', text) if word in known}
    assert said <= known
    assert [name for name in known - said if not name.startswith(tuple(prefixes))] == []


# ---------------------------------------------------------------- contrast


def colours(sheet: str) -> dict[str, str]:
    return dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", FILES[sheet]))


def luminance(colour: str) -> float:
    """WCAG 2.2, relative luminance."""
    channels = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


TEXT = [
    ("text", "ground"), ("text", "surface"), ("text", "raised"), ("text", "accent-soft"), ("text", "good-soft"),
    ("text", "warn-soft"), ("text", "bad-soft"), ("muted", "ground"), ("muted", "surface"), ("on-accent", "accent"),
    ("accent", "surface"), ("accent", "accent-soft"), ("good", "good-soft"), ("warn", "warn-soft"),
    ("bad", "bad-soft"), ("bad", "surface"), ("on-viewer", "viewer"), ("region", "halo"), ("drawn", "halo"),
]  # fmt: skip
CONTROLS = [
    ("edge", "surface"), ("edge", "ground"), ("edge", "raised"), ("focus", "surface"), ("focus", "ground"),
    ("accent", "ground"), ("good", "raised"), ("warn", "raised"), ("region", "viewer"), ("bad", "ground"),
]  # fmt: skip


def test_contrast_is_computed_as_wcag_does() -> None:
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_contrast_reaches_aa_in_both_themes(theme: str) -> None:
    palette = colours("style.css") | (colours("dark.css") if theme == "dark" else {})
    low = {pair: round(contrast(palette[pair[0]], palette[pair[1]]), 2) for pair in TEXT + CONTROLS}
    assert {pair: ratio for pair, ratio in low.items() if ratio < (4.5 if pair in TEXT else 3)} == {}


def test_the_dark_theme_replaces_every_colour_but_the_viewers() -> None:
    fixed = {"viewer", "on-viewer", "region", "drawn", "halo"}
    assert set(colours("dark.css")) == set(colours("style.css")) - fixed


# ---------------------------------------------------------------- how it is served


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PageServer]:
    with PageServer(tmp_path_factory.mktemp("page"), max_image_bytes=20_000, max_pixels=40_000, max_side=100) as server:
        yield server


def send(server: PageServer, path: str, method: str = "GET", body: bytes | None = None, **headers: str) -> Answer:
    connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=20)
    try:
        connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
        answer = connection.getresponse()
        return answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()
    finally:
        connection.close()


@pytest.mark.parametrize("name", sorted(FILES))
def test_files_are_served_with_the_policy_and_not_again_while_they_are_the_same(server: PageServer, name: str) -> None:
    path = "/" if name == "index.html" else f"/page/{name}"
    status, headers, body = send(server, path)
    assert (status, body.decode()) == (200, FILES[name])
    assert headers["content-security-policy"] == page.POLICY
    assert headers["cache-control"] == "no-cache"
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["content-type"].split(";")[0] == page.MEDIA_TYPES[Path(name).suffix]
    for tag in (headers["etag"], f'"other", W/{headers["etag"]}'):
        again, known, nothing = send(server, path, if_none_match=tag)
        assert (again, nothing, known["etag"]) == (304, b"", headers["etag"])
        assert known["content-security-policy"] == page.POLICY
    assert send(server, path, if_none_match='"other"')[0] == 200
    head, about, nothing = send(server, path, "HEAD")
    assert (head, nothing, about["content-length"]) == (200, b"", str(len(body)))


def test_the_policy_lets_nothing_in() -> None:
    directives = {name: values for name, *values in (part.split() for part in page.POLICY.split("; "))}
    assert directives["default-src"] == directives["base-uri"] == directives["form-action"] == ["'none'"]
    assert directives["frame-ancestors"] == ["'none'"]
    assert directives["script-src"] == directives["style-src"] == directives["connect-src"] == ["'self'"]
    assert "unsafe" not in page.POLICY


@pytest.mark.parametrize(
    "path", ["/page/", "/page/../page.py", "/page/..%2fpage.py", "/page/%2e%2e/page.py", "/page/nothing.js"]
)
def test_nothing_but_the_files_is_served(server: PageServer, path: str) -> None:
    status, _, body = send(server, path)
    assert status == 404
    assert b"import" not in body


def test_a_file_of_an_unknown_type_is_no_part_of_the_page(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ValueError, match=r"notes\.txt"):
        page.read_assets(tmp_path)


# ---------------------------------------------------------------- preview


def preview(server: PageServer, body: bytes, query: str = "", key: str = KEY) -> Answer:
    return send(server, f"/v1/preview{query}", "POST", body, authorization=f"Bearer {key}")


def code_of(body: bytes) -> str:
    code: str = json.loads(body)["error"]["code"]
    return code


def test_the_preview_is_the_image_as_the_model_is_given_it(server: PageServer) -> None:
    data = png(1, 64, 48)
    status, headers, body = preview(server, data)
    assert status == 200
    assert [headers[f"x-image-{name}"] for name in ("width", "height", "frame", "frames")] == ["64", "48", "0", "1"]
    assert headers["cache-control"] == "no-store"
    given = page.read_picture(data, server.settings, None, "body")
    assert (headers["content-type"], body) == (given.media_type, given.data)
    with Image.open(io.BytesIO(body)) as shown, Image.open(io.BytesIO(data)) as sent:
        assert shown.convert("RGB").tobytes() == sent.convert("RGB").tobytes()


def test_a_large_image_is_reduced_and_its_own_size_told(server: PageServer) -> None:
    stream = io.BytesIO()
    Image.new("L", (200, 100), 7).save(stream, "PNG")
    _, headers, body = preview(server, stream.getvalue())
    assert (headers["x-image-width"], headers["x-image-height"]) == ("200", "100")
    with Image.open(io.BytesIO(body)) as shown:
        assert shown.size == (100, 50)


def test_a_frame_is_picked(server: PageServer) -> None:
    stream = io.BytesIO()
    pages = [Image.new("L", (30, 20), shade) for shade in (10, 120, 240)]
    pages[0].save(stream, "TIFF", save_all=True, append_images=pages[1:])
    shades = {}
    for query in ("", "?frame=0", "?frame=2"):
        _, headers, body = preview(server, stream.getvalue(), query)
        assert headers["x-image-frames"] == "3"
        with Image.open(io.BytesIO(body)) as shown:
            shades[headers["x-image-frame"]] = shown.convert("L").getpixel((0, 0))
    assert shades == {"1": 120, "0": 10, "2": 240}


def test_bad_previews_are_refused(server: PageServer) -> None:
    assert preview(server, b"")[0] == 400
    assert preview(server, b"no image")[0] in (400, 415)
    assert preview(server, png(), "?frame=1")[0] == 400
    assert preview(server, png(), "?frame=-1")[0] == 422
    assert preview(server, png(), key="other")[0] == 401
    assert send(server, "/v1/preview")[0] == 405
    status, _, body = preview(server, png(0, 90, 90))
    assert (status, code_of(body)) == (413, "image-too-large")
    stream = io.BytesIO()
    Image.new("L", (400, 400)).save(stream, "PNG")
    assert preview(server, stream.getvalue())[0] in (400, 413)


def test_a_refused_preview_names_the_request_and_nothing_of_the_file(server: PageServer) -> None:
    _, headers, body = preview(server, b"Patient: Miller")
    error = json.loads(body)["error"]
    assert error["request_id"] == headers["x-request-id"]
    assert "Miller" not in body.decode()


def test_a_preview_that_is_not_ready_in_time_is_refused(server: PageServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "read_picture", lambda *_: time.sleep(1))
    with PageServer(server.settings.data_dir, deadline=0.2) as busy:
        status, headers, body = preview(busy, png())
    assert (status, code_of(body)) == (503, "busy")
    assert int(headers["retry-after"]) >= 1
