"""What serves a release: the predictor (KServe) and the gateway (FastAPI), run as `python -m serving.gateway`."""
