"""Text <-> tokens: every tokenizer, and the turns of conversations.

A new one is a class in basic.py and a line in data/vocabulary.py, which makes it for a text.
"""
