"""What the gateway costs a request, against a plain proxy and LiteLLM's."""
