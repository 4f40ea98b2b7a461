"""The questions of a file for a chat model, and those that it was taught."""

from pathlib import Path

from humptygpt import cli
from humptygpt.cli import UserError, as_user_error, note
from humptygpt.data.chat_dataset import Exchange
from humptygpt.data.conversations import asked_columns, parse
from humptygpt.data.documents import Flaws, read_records
from humptygpt.data.open import open_data
from humptygpt.generation.chat import check_room
from humptygpt.models.build import make_model_config
from humptygpt.tokenizers.chat import ChatTokenizer
from humptygpt.training.chat import TAUGHT
from humptygpt.training.resume import check_same_data
from humptygpt.training.settings import TrainConfig


def read_chats(path: str, text_key: str | None, tokenizer: ChatTokenizer, block_size: int) -> list[Exchange]:
    """Read the last exchange of each conversation in a file. Raises UserError for the first that is not valid."""
    columns = asked_columns(text_key or "")
    found = []
    for where, record in read_records(Path(path), columns, Flaws()):
        with as_user_error(f"{where}: "):
            *before, reply = parse(record, columns)
            if not before:
                raise ValueError("it has no question")
            prompt = tokenizer.encode_turns(before, reply=True).tolist()
            check_room(prompt, block_size)
            tokens = len(tokenizer.encode(reply.content)) + 1
            found.append(Exchange(prompt, before[-1].content, reply.content, tokens))
    if not found:
        raise UserError(f"{path} has no conversations")
    return found


def taught(run: dict | None) -> list[Exchange]:
    """Return what a run was taught; with a note, nothing if its data is not there any more. run: as in Pipeline."""
    try:
        if not run:
            raise UserError("this model was not trained here")
        config = cli.restore(TrainConfig, run["train_config"])
        model_config = make_model_config(run["model_config"])
        dataset = open_data(config.dataset, model_config, config.seed)
        check_same_data(run, dataset, config.out_dir)
        return dataset.exchanges("train", TAUGHT)
    except UserError as error:
        note(f"there is no lookup to compare with: {error}")
        return []
