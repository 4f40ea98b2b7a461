"""The article's first network, without attention."""
