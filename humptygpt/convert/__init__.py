"""Import and export models: Hugging Face folders and downloads, LoRA adapters, nanoGPT checkpoints, GGUF files."""
