"""A model and a prompt -> texts, translations and replies."""
