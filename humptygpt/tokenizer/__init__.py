"""Text to token ids and back, by one encode and decode over all kinds of vocabulary.

In: text, a saved tokenizer, or one in Hugging Face's format. Out: token ids, or that format. It imports core alone.
"""
