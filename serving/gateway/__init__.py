"""The gateway: what hospital systems and readers call. It holds no model and imports no torch."""
