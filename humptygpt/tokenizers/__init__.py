"""Text <-> tokens: every tokenizer, and the turns of conversations."""
