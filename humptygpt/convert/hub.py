"""Download models from the Hugging Face Hub by name, to the cache that other programs use as well.

huggingface_hub's environment variables apply: HF_ENDPOINT selects a mirror, HF_TOKEN gives access to gated models,
HF_HOME is the folder that contains the cache, and HF_HUB_OFFLINE=1 prevents network access. Only text files and weights
are downloaded, and pickles only if a model has no safetensors files.
"""

import os
import re
from pathlib import Path

from humptygpt.cli import UserError, one_line

GPT2 = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
TEXT_FILES = [
    "config.json",
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "tokenizer_config.json",
    "chat_template.jinja",
]
WEIGHTS = [  # groups of file patterns; only the first group that the model has is downloaded
    ["model.safetensors", "model-*.safetensors", "model.safetensors.index.json"],
    ["pytorch_model.bin", "pytorch_model-*.bin", "pytorch_model.bin.index.json"],
]


def repository(name: str) -> str | None:
    """Expand a name to owner/model. Returns None if it cannot be a name on the Hub, as a path cannot."""
    if name in GPT2:
        return f"openai-community/{name}"
    owner = name.partition("/")[0]
    local = owner in ("out", "data") or os.path.exists(owner)
    return name if REPOSITORY.fullmatch(name) and not local else None


def fetch_model(repo: str) -> Path:
    """Download a model. Returns its folder. Raises UserError, if possible before weights are downloaded."""
    # imported here, because it loads torch
    from humptygpt.convert.huggingface import read_config

    read_config(fetch(repo))
    for names in WEIGHTS:
        folder = fetch(repo, names)
        if any(path for name in names for path in folder.glob(name)):
            break
    return folder


def fetch(repo: str, names: list[str] = TEXT_FILES) -> Path:
    """Download those files of a model that have these names: by default, all but its weights.

    Returns their folder. Raises UserError if this fails.
    """
    # imported here, because they take half a second to load
    from huggingface_hub import constants, snapshot_download

    try:
        return Path(snapshot_download(repo, allow_patterns=names))
    # the class of the error comes from requests or httpx, depending on the version
    except Exception as error:
        reason = one_line(error.__cause__ or error)
        raise UserError(
            f"{repo} cannot be fetched from {constants.ENDPOINT}: {reason}; check the name, set HF_TOKEN if access"
            " to the model is restricted, set HF_ENDPOINT to a mirror, or give a folder that contains the model"
        ) from error
