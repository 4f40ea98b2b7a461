"""Convert documents to token files, and fetch the built-in data sets."""
