"""What the gateway refuses to start with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from serving.gateway.settings import PREFIX, Settings, load

LONG = "x" * 32


def make(**values: Any) -> Settings:
    return Settings(_env_file=None, **values)


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


def test_production_refuses_default_and_short_secrets() -> None:
    for secret in ("change-this", "x" * 31, ""):
        with pytest.raises(ValidationError, match=f"{PREFIX}SECRET_KEY"):
            make(environment="production", secret_key=secret)
    assert make(environment="production", secret_key=LONG).environment == "production"


def test_production_refuses_to_be_open() -> None:
    with pytest.raises(ValidationError, match=f"{PREFIX}AUTHENTICATION"):
        make(environment="production", secret_key=LONG, authentication=False)
    assert not make(authentication=False).authentication


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"candidate_weight": 0.1}, "candidate"),
        ({"oidc_issuer": "https://i"}, "oidc_audience"),
        ({"rate": "lots"}, "lots"),
        ({"quota": "10/fortnight"}, "fortnight"),
        ({"stable": "ftp://x"}, "ftp"),
        ({"stable": "localhost:8081"}, "localhost"),
        ({"candidate_weight": 1.5, "candidate": "http://x"}, "candidate_weight"),
        ({"deadline": 0}, "deadline"),
        ({"burned_in": "perhaps"}, "burned_in"),
        ({"rate": "0/minute"}, "0/minute"),
        ({"candidate_release": "ab"}, "candidate_release has no effect without candidate"),
        ({"oidc_jwks_url": "https://i/keys"}, "oidc_jwks_url has no effect without oidc_issuer"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(values: dict[str, Any], named: str) -> None:
    with pytest.raises(ValidationError, match=named):
        make(**values)


def test_the_environment_is_read_and_a_misspelt_variable_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"{PREFIX}CONCURRENCY", "7")
    monkeypatch.setenv(f"{PREFIX}ALLOWED_HOSTS", '["a.example", "b.example"]')
    assert load().concurrency == 7
    assert load().allowed_hosts == ["a.example", "b.example"]
    monkeypatch.setenv(f"{PREFIX}CONCURENCY", "7")
    with pytest.raises(ValueError, match=f"{PREFIX}CONCURENCY.*--help"):
        load()


def test_a_misspelt_line_of_the_env_file_is_named(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text(f"OTHER=1\n{PREFIX}CONCURRENCY=9\n")
    assert load().concurrency == 9
    (tmp_path / ".env").write_text(f"{PREFIX}CONCURENCY=9\n")
    with pytest.raises(ValueError, match=f"{PREFIX}CONCURENCY: is not a setting"):
        load()


def test_secrets_are_not_shown() -> None:
    shown = repr(make(secret_key=LONG, upstream_key="hunter22"))
    assert LONG not in shown
    assert "hunter22" not in shown


def test_the_database_is_in_the_data_folder_unless_it_is_named(tmp_path: Path) -> None:
    assert make(data_dir=tmp_path).database_url == f"sqlite:///{tmp_path}/gateway.db"
    assert make(database="postgresql://h/n").database_url == "postgresql://h/n"


def test_a_url_loses_its_last_slash() -> None:
    assert make(stable="http://h/openai/v1/").stable == "http://h/openai/v1"
