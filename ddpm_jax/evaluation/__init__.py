"""Evaluation of a run: metrics, figures and the report."""
