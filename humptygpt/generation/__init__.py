"""A model and a prompt -> text: sampling token after token, beam search for translations, the score of a given text.

In comes a model from model.py, with token ids; out come tokens, characters, translations and log-probabilities.
decoder.py makes a model faster for this, tasks.py says what a task means to data, training, evaluation and sampling.
The room may import core, nn, tokenizer, model and data.
"""
