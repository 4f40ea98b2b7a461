"""A trained model and a prompt to text: sampling, the fast decoder, beam search, scoring.

In: a model and token ids. Out: token ids, log-probabilities, text. It imports core, nn, tokenizer, data and model.py.
"""
