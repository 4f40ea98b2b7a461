"""Several processes, each computing a part of every step: with DDP on whole models, with FSDP on sharded ones.

In: a model and batches. Out: the gradients over all batches. It imports checkpoint, config, data, files, optimizers,
process, schema, tasks and model.py.
"""
