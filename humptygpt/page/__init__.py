"""From a run's folder to the plain data that explain.py puts into a page: settings, weights, tokenizer, metrics."""
