"""Training on several processes, each computing a part of every step: DDP replicates the model, FSDP shards it."""
