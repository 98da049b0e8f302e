"""The gateway's fixtures, as the unit tests have them."""

from tests.unit.gateway.conftest import fake, gateway, key, serve, settings

__all__ = ["fake", "gateway", "key", "serve", "settings"]
