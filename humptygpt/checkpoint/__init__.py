"""Our own files of a model: their schema, written whole and checked when they are read; sharded ones as well.

In: tensors and plain data. Out: files, and the same from files. It imports core, nn, tokenizer and model.py.
"""
