"""FineWeb: web pages in English, from the Hub, in GPT-2's tokens; 2 GB a file."""

from humptygpt.data.builtin import hub_files

REPOSITORY = "HuggingFaceFW/fineweb"
FILES = "sample/10BT/{:03}_00000.parquet"
tokenizer = "gpt2"
val_fraction = 0.005
files = 1


def fetch(config):
    return hub_files(REPOSITORY, FILES, config)
