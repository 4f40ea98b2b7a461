"""Collect the data of a run for explain.py's page: settings, weights, tokenizer and metrics."""
