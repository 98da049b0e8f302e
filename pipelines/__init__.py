"""The pipelines, and running, compiling and submitting them."""
