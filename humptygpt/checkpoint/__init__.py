"""Our own files of a model: their schema, written whole and checked when they are read; sharded ones as well.

In: tensors and plain data. Out: files, and the same from files. It imports core, tokenizer
and model.py; what a checkpoint needs to know of optimizers and processes is handed to it.
"""
