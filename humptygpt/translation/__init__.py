"""Sentence pairs, beam search and scores of translations."""
