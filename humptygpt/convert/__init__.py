"""Import and export models: Hugging Face folders and downloads, nanoGPT checkpoints, GGUF files."""
