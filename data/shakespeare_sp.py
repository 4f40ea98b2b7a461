"""Tiny Shakespeare in subwords."""

from humptygpt.data.builtin import data_set

fetch = data_set("shakespeare").fetch
tokenizer = "sentencepiece"
vocab_size = 1024
