"""Several processes: each computes a part of a step, DDP on whole models, FSDP on sharded ones.

In: a model and batches. Out: gradients of all of them. It imports core, nn, data, checkpoint and model.py.
"""
