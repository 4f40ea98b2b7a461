"""A config -> a model: networks beside model.py's GPT, and what is done to any of them."""
