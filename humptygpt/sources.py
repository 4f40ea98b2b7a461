"""How a script names a model, and models on the Hugging Face Hub, which go to the cache that other programs use.

huggingface_hub's environment variables apply: HF_ENDPOINT selects a mirror, HF_TOKEN gives access to gated models,
HF_HOME is the folder that contains the cache, and HF_HUB_OFFLINE=1 prevents network access. Only text files and weights
are downloaded, and no pickles.
"""

import os
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from humptygpt.cli import UserError, check_choices, one_line

GPT2 = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
TEXT_FILES = [
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
]
WEIGHTS = ["model.safetensors", "model-*.safetensors", "model.safetensors.index.json"]


@dataclass(frozen=True)
class RunSource:
    """A run."""

    # model
    out_dir: str = "out"  # folder of the run, or a checkpoint in it
    checkpoint: str = "best"  # best: best.pt; latest: ckpt.pt

    @classmethod
    def choices(cls) -> dict[str, Collection[str]]:
        return {"checkpoint": ("best", "latest")}

    def validate(self) -> None:
        check_choices(self)


@dataclass(frozen=True)
class ModelSource(RunSource):
    """A run or any other model."""

    # model
    init_from: str = "resume"  # resume: a checkpoint in out_dir; otherwise a run, a checkpoint, a model folder or gpt2


# --------------------------------------------------------------------------------------
# The Hugging Face Hub


def repository(name: str) -> str | None:
    """Expand a name to owner/model. Returns None if it cannot be a name on the Hub, as a path cannot."""
    if name in GPT2:
        return f"openai-community/{name}"
    owner = name.partition("/")[0]
    local = owner in ("out", "data") or os.path.exists(owner)
    return name if REPOSITORY.fullmatch(name) and not local else None


def fetch_model(repo: str, check: Callable[[Path], object]) -> Path:
    """Download a model. Returns its folder. Raises UserError if this fails.

    check: is called with the folder before weights are downloaded, and raises UserError if they cannot be used.
    """
    check(fetch(repo))
    return fetch(repo, WEIGHTS)


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
