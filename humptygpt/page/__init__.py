"""A run to what its page computes with.

In: a run's folder. Out: plain data for explain.py to put into one HTML file: settings, weights, tokenizer, metrics.
It may import core, nn, tokenizer, model, data, checkpoint, generation and interchange.
"""
