"""Rollout: an approved release to a canary, then to all callers or back, through the Kubernetes API and the gateway."""
