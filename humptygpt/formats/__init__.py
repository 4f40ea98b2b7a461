"""A model and its tokenizer <-> files: checkpoints, Hugging Face's formats, GGUF."""
