"""Tiny Shakespeare, with a token for each character."""

from humptygpt.data.builtin import data_set

fetch = data_set("shakespeare").fetch
tokenizer = "char"
