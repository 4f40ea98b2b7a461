"""Fine-tuning by LoRA."""
