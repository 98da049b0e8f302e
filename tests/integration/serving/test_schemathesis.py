"""Schemathesis reads the gateway's OpenAPI document and calls every route with what it allows and what it does not."""

from __future__ import annotations

from typing import Any

import schemathesis
from hypothesis import HealthCheck, Phase
from hypothesis import settings as bounded
from schemathesis.config import SchemathesisConfig

from serving.gateway.app import create_app
from serving.gateway.settings import Settings
from tests.unit.gateway.conftest import Gateway

# nothing is opened before the application's lifespan begins
_document = create_app(Settings(_env_file=None)).openapi()
# unknown parameters of a query are passed over, as they are on the web
_config = SchemathesisConfig.from_dict({"generation": {"allow-extra-parameters": False}})
schema = schemathesis.openapi.from_dict(_document, config=_config)


@schema.parametrize()
@bounded(
    max_examples=25,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
def test_every_route_keeps_to_its_description(case: Any, gateway: Gateway, key: str) -> None:
    """No failure of the server, no status, content type, header or document that is not described, no method that is
    not; and what breaks the schema is refused."""
    # what fits the schema may still be no image, or no job of this caller; that each route wants a key is tested in
    # test_security.py: the check here takes a key that a test gives for one that it made up itself
    allowed = [schemathesis.checks.positive_data_acceptance, schemathesis.checks.ignored_auth]
    headers = {"authorization": f"Bearer {key}"}
    case.call_and_validate(base_url=gateway.url, headers=headers, excluded_checks=allowed)
