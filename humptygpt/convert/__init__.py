"""Other formats: Hugging Face's models, adapters and tokenizers in and out, the hub, GGUF, the model card."""
