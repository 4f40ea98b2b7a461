"""Sentence pairs, beam search and translation scores."""
