"""Models of other programs, in and out: Hugging Face's folders, adapters, the hub, nanoGPT, GGUF."""
