"""The pages that show a model in a browser."""
