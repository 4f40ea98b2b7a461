"""Convert models from and to other formats: Hugging Face folders, LoRA adapters, the hub, nanoGPT, GGUF."""
