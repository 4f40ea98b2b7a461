"""Open data/<name> for a model, and prepare it first if it is missing."""

import pkgutil
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from humptygpt import cli
from humptygpt.cli import UserError, as_user_error
from humptygpt.data.dataset import COMMAND, Dataset, read_meta
from humptygpt.machine import launched
from humptygpt.model import ModelConfig
from humptygpt.models.build import MODELS, model_class
from humptygpt.tokenizers.basic import Tokenizer

if TYPE_CHECKING:  # a run's settings, of which some are for data
    from humptygpt.training.settings import TrainConfig

CLASSES = {  # {task: the class that reads its data and makes batches}
    "language modelling": "humptygpt.data.dataset:TokenDataset",
    "translation": "humptygpt.data.pair_dataset:PairDataset",
    "chat": "humptygpt.data.chat_dataset:ChatDataset",
}


def prepare_missing(
    config: "TrainConfig",
    open_tokenizer: Callable[[str], Tokenizer],
    overwrite: bool = False,
) -> None:
    """Prepare data/<dataset> if it is missing or incomplete. With --input, check that the input has not changed.

    open_tokenizer: as for prepare(). overwrite: if the input has changed, prepare it again.
    """
    folder = Path("data") / config.dataset
    with as_user_error():
        names = {path.name for path in folder.glob("*")}
    if "meta.json" in names and (config.input is None or launched()[0]):
        return
    # late import: it is rarely needed
    from humptygpt.data.prepare import PrepareConfig, prepare

    keys = {}
    if config.input:
        keys = input_keys(config, folder)
        keys["overwrite"] = overwrite and COMMAND in names  # not the data of another program
    # Do not overwrite existing data: a train.bin without a meta.json is another program's, and a command.txt
    # means that this folder was prepared here before.
    elif names & {"train.bin", COMMAND}:
        return
    keys["name"] = config.dataset
    prepare(cli.make(PrepareConfig, keys), open_tokenizer)


def input_keys(config: "TrainConfig", folder: Path) -> dict[str, object]:
    """Return the settings for preparing config.input: those that the folder was made with, updated by config.

    For a new folder, fine-tuning uses the base model's tokenizer by default.
    Raises UserError if the folder was made from a different input.
    """
    from humptygpt.data.settings import PrepareConfig

    keys = {"input": config.input}
    if config.init_from != "scratch":
        keys["tokenizer"] = config.init_from
    command = folder / COMMAND
    if command.exists():
        with as_user_error(f"{command}: "):
            words = shlex.split(command.read_text(encoding="utf-8"))[2:]
            keys = cli.read(words, PrepareConfig, positional="name")
        if Path(keys.get("input", "")).resolve() != Path(config.input).resolve():
            raise UserError(
                f"{folder} was not made from input={config.input}; choose another name: --dataset=ANOTHER_NAME"
            )
    for key in ("text_key", "val_input", "val_fraction"):
        if (value := getattr(config, key)) is not None:
            keys[key] = value
    return keys


def open_data(name: str, model_config: ModelConfig, seed: int) -> Dataset:
    """Open data/<name> for a model. seed: for the order of the data. Raises UserError if the model cannot learn it."""
    folder = Path("data") / name
    meta = read_meta(folder)
    with_encoder = hasattr(model_class(model_config.model), "encode")
    _, learns = MODELS[model_config.model]
    if meta["task"] not in learns:
        raise UserError(
            f"dataset={name} is for {meta['task']}, but model={model_config.model} is for {' and '.join(learns)}"
        )
    dataset = pkgutil.resolve_name(CLASSES[meta["task"]])
    return dataset(folder, model_config.block_size, seed, with_encoder, meta)
