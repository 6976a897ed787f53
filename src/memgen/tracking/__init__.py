"""Metrics and the MLflow record of a run."""
