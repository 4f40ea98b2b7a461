"""The first networks of the article linked in README.md: feed-forward, without attention."""
