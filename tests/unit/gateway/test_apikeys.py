"""API keys: made once, kept as a keyed hash, rotated with a time of grace, revoked; and their commands."""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import create_engine
from sqlalchemy.engine import Engine

from medforge import apikeys, cli

SECRET = "s" * 32
NOW = 1_760_000_000.0
HOUR = 3600.0


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    made = create_engine(f"sqlite:///{tmp_path}/keys.db")
    apikeys.create(made)
    apikeys.create(made)  # twice is no error
    yield made
    made.dispose()


def found(engine: Engine, text: str, now: float = NOW) -> apikeys.Key | None:
    """The key, if the text is right."""
    parsed = apikeys.parse(text)
    assert parsed
    key = apikeys.find(engine, parsed[0], now)
    return key if key and apikeys.matches(key, parsed[1], SECRET) else None


def test_a_key_is_found_by_its_text_and_by_nothing_else(engine: Engine) -> None:
    key, text = apikeys.add(engine, SECRET, "ris", NOW, kind="batch", scopes=("jobs", "chat"), rate="5/minute")
    assert re.fullmatch(r"mf_[0-9a-f]{16}_[A-Za-z0-9_-]{43}", text)
    again = found(engine, text)
    assert again is not None
    assert (again.name, again.kind, again.scopes, again.rate) == ("ris", "batch", {"jobs", "chat"}, "5/minute")
    assert again.client == key.client
    other = text[:-1] + ("A" if text[-1] != "A" else "B")
    assert found(engine, other) is None
    secret = apikeys.parse(text)
    assert secret
    assert not apikeys.matches(again, secret[1], "another secret key")


def test_only_a_keyed_hash_of_the_secret_is_kept(engine: Engine, tmp_path: Path) -> None:
    _, text = apikeys.add(engine, SECRET, "ris", NOW)
    secret = text.split("_", 2)[2]
    kept = (tmp_path / "keys.db").read_bytes()
    assert secret.encode() not in kept
    assert hashlib.sha256(secret.encode()).hexdigest().encode() not in kept
    assert hmac.new(SECRET.encode(), secret.encode(), hashlib.sha256).hexdigest().encode() in kept


@pytest.mark.parametrize("text", ["", "mf_", "mf_1_2", "sk-abc", "mf_" + "0" * 16 + "_" + "a" * 42, "mf_é"])
def test_what_cannot_be_a_key_is_not_looked_up(text: str) -> None:
    assert apikeys.parse(text) is None


def test_it_expires_and_is_revoked(engine: Engine) -> None:
    key, text = apikeys.add(engine, SECRET, "ris", NOW, expires=NOW + HOUR)
    assert [key.state(NOW + more) for more in (0, HOUR - 1, HOUR)] == ["valid", "valid", "expired"]
    assert [one.id for one in apikeys.revoke(engine, "ris", NOW + 1)] == [key.id]
    assert (again := found(engine, text))
    assert again.state(NOW + 2) == "revoked"
    with pytest.raises(ValueError, match="no valid key is named 'ris'"):
        apikeys.revoke(engine, "ris", NOW + 2)


def test_rotation_keeps_the_client_and_gives_the_old_key_some_grace(engine: Engine) -> None:
    old, old_text = apikeys.add(engine, SECRET, "ris", NOW, scopes=("chat",), rate="7/minute", expires=NOW + 100 * HOUR)
    new, new_text = apikeys.rotate(engine, SECRET, "ris", NOW + HOUR, grace=2 * HOUR)
    assert new_text != old_text
    assert (new.client, new.scopes, new.rate) == (old.client, old.scopes, old.rate)
    assert new.expires == NOW + 101 * HOUR  # as long a life again
    former, latter = found(engine, old_text), found(engine, new_text)
    assert former
    assert latter
    assert [former.state(NOW + hours * HOUR) for hours in (2, 2.99, 3)] == ["valid", "valid", "expired"]
    assert latter.state(NOW + 3 * HOUR) == "valid"
    apikeys.rotate(engine, SECRET, "ris", NOW + 2 * HOUR, grace=50 * HOUR)
    again = found(engine, old_text)
    assert again
    assert again.expires == NOW + 3 * HOUR  # a second rotation gives it no longer life


def test_a_name_has_one_client(engine: Engine) -> None:
    apikeys.add(engine, SECRET, "ris", NOW)
    with pytest.raises(ValueError, match="rotate or revoke"):
        apikeys.add(engine, SECRET, "ris", NOW)
    apikeys.revoke(engine, "ris", NOW)
    apikeys.add(engine, SECRET, "ris", NOW)


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("name", {"name": ""}),
        ("name", {"name": "a\nb"}),
        ("name", {"name": "x" * 65}),
        ("kind", {"kind": "robot"}),
        ("scopes", {"scopes": ("chat", "everything")}),
        ("scopes", {"scopes": ()}),
        ("rate", {"rate": "0/minute"}),
        ("quota", {"quota": "many"}),
        ("expires", {"expires": NOW}),
    ],
)
def test_a_wrong_field_is_named(engine: Engine, field: str, values: dict[str, object]) -> None:
    name = str(values.pop("name", "ris"))
    with pytest.raises(ValueError, match=f"^{field}: "):
        apikeys.add(engine, SECRET, name, NOW, **values)  # type: ignore[arg-type]
    assert apikeys.listed(engine) == []


def test_last_use_is_kept_to_the_hour(engine: Engine) -> None:
    _, text = apikeys.add(engine, SECRET, "ris", NOW)
    uses = []
    for more in (10, 20, HOUR + 5, HOUR + 20):
        found(engine, text, NOW + more)
        uses.append(apikeys.listed(engine)[0].last_used)
    assert uses == [NOW + 10, NOW + 10, NOW + 10, NOW + HOUR + 20]


def test_the_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MEDFORGE_GATEWAY_SECRET_KEY", SECRET)
    folder = ["--data-dir", str(tmp_path / "g")]
    assert cli.main(["keys", "add", "ris-north", "--scopes", "diagnose,chat", "--days", "30", *folder]) == 0
    text = capsys.readouterr().out.strip()
    engine = create_engine(f"sqlite:///{tmp_path}/g/gateway.db")
    key = apikeys.listed(engine)[0]
    assert key.scopes == {"diagnose", "chat"}
    assert key.expires == pytest.approx(key.created + 30 * 86400)
    secret = apikeys.parse(text)
    assert secret
    assert apikeys.matches(key, secret[1], SECRET)
    assert (tmp_path / "g" / "gateway.db").stat().st_mode & 0o777 == 0o600
    assert cli.main(["keys", "rotate", "ris-north", "--grace-hours", "1", *folder]) == 0
    second = capsys.readouterr().out.strip()
    assert second != text
    assert cli.main(["keys", "list", *folder]) == 0
    shown = capsys.readouterr().out
    assert shown.count("ris-north") == 2
    assert text.split("_", 2)[2] not in shown
    assert cli.main(["keys", "revoke", "ris-north", *folder]) == 0
    capsys.readouterr()
    assert {key.revoked is not None for key in apikeys.listed(engine)} == {True}
    assert cli.main(["keys", "revoke", "ris-north", *folder]) == 1
    assert "no valid key is named 'ris-north'" in capsys.readouterr().err
    assert cli.main(["keys", "list", "--database", "nonsense"]) == 1
    assert "--database" in capsys.readouterr().err
    engine.dispose()
