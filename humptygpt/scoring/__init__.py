"""How likely a model finds a given text, and which of two texts it finds likelier."""
