"""The steps of the pipeline: what a component calls. Each takes the run's configuration as JSON and paths as text.

A step reads its part of the configuration (`settings`), does the work through `workspace.run_step`, and logs a few
figures to `metrics`, an object with `log_metric(name, value)` (Kubeflow's Metrics artifact).
"""
