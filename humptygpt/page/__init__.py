"""Collect the data of a run that explain.py puts into a page: settings, weights, tokenizer, metrics."""
