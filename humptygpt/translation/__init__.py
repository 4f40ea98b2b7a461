"""Translation: sentence pairs, the encoder-decoder model, beam search and scores."""
