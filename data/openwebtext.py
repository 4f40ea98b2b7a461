"""OpenWebText: an open version of GPT-2's training text, from the Hub, in GPT-2's tokens; 300 MB a file."""

from humptygpt.data.builtin import hub_files

REPOSITORY = "Skylion007/openwebtext"
FILES = "plain_text/train-{:05}-of-00080.parquet"
tokenizer = "gpt2"
val_fraction = 0.0005
files = 1


def fetch(config):
    return hub_files(REPOSITORY, FILES, config)
