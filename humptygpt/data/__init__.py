"""Documents and sentence pairs to token files, and token files to batches.

In: texts, tables of pairs, public data sets. Out: data/<name>, and batches that are a pure function of (seed, step). It
imports core and tokenizer, and no torch but in batches.py.
"""
