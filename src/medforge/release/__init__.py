"""Releases: the verdict of a policy, an immutable release in the object store, and the signatures of reviewers."""
