"""The data of a run's page, for the JavaScript in explain/: config, weights, tokenizer and metrics, as JSON."""

import base64
import math
from contextlib import suppress
from pathlib import Path

import torch
from torch import nn

from humptygpt.cli import UserError, convert, fields_of, note
from humptygpt.data.builtin import data_set
from humptygpt.data.dataset import TokenFile, read_meta
from humptygpt.files import refuse_damaged
from humptygpt.formats import checkpoint
from humptygpt.formats.load import Loaded, from_checkpoint
from humptygpt.model import ModelConfig
from humptygpt.models.checks import rounded_logits, text_to_compare
from humptygpt.page.snapshots import SNAPSHOTS, to_8_bits
from humptygpt.tokenizers.basic import END_OF_TEXT, SentencePieceTokenizer, Tokenizer
from humptygpt.tokenizers.sentencepiece_model import merge_scores
from humptygpt.training.loggers import read_metrics
from humptygpt.training.settings import TrainConfig

# keys of TrainConfig that training.js in explain/ obeys
TRAINING = (
    "optimizer learning_rate muon_learning_rate muon_momentum beta1 beta2 weight_decay grad_clip"
    " max_iters decay_lr schedule warmup_iters lr_decay_iters min_lr batch_size seed"
)
# implemented in explain/tokenizer.js
TOKENIZERS = ("char", "byte", "sentencepiece", "gpt2", "bpe")
START_TOKENS = 64  # length of the text that a page starts with
TEXT_TOKENS = 20_000  # length of the text on which a page can go on with the training


def page_data(path: Path, start: str | None = None, snapshots: bool = True) -> dict:
    """Collect the data of a page. Raises UserError if the page cannot show this run.

    path: the run's checkpoint. start: the text that the page shows first; None: the beginning of the validation split.
    """
    run = from_checkpoint(path)
    tokenizer = tokenizer_data(run.tokenizer)
    with refuse_damaged(path):
        training = training_data(run)
    saved = run.saved["progress"]
    if run.model.config.n_members > 1:
        note(f"the page shows the first of {run.model.config.n_members} members")
    shown = getattr(run.model, "members", [run.model])[0]
    return {
        "name": path.parent.resolve().name,
        "task": run.task,
        # before the first evaluation the best loss is infinite, and JSON has no infinity
        "progress": {key: saved[key] for key in ("iter", "best_val_loss") if saved[key] < math.inf},
        "training": training,
        "text": read_split(run, "train", TEXT_TOKENS) if run.task == "language modelling" else "",
        **model_data(shown),
        "check": check_data(shown),
        "snapshots": snapshot_data(path.parent, saved["iter"], shown) if snapshots else [],
        "tokenizer": tokenizer,
        "questions": run.questions,
        "start": start or example_text(run),
        "metrics": read_metrics(path.with_name("metrics.jsonl")),
    }


def training_data(run: Loaded) -> dict:
    """Return the settings with which the page trains."""
    values, fields = run.saved["train_config"], fields_of(TrainConfig)
    return {key: convert(key, values[key], fields[key].type) for key in TRAINING.split()}


def playground_data() -> dict:
    """Collect the data of a page that trains new models: texts, and the defaults of all settings."""
    sonnets = Path(__file__).with_name("sonnets.txt")
    return {
        "texts": {
            "The rhyme, ten times": data_set("humpty_dumpty").RHYMES,
            "Sonnets by Shakespeare": sonnets.read_text(encoding="utf-8"),
            "Damian's sentences": data_set("wills").write_wills(150),
        },
        "config": vars(ModelConfig()),
        "training": {key: getattr(TrainConfig, key) for key in TRAINING.split()},
    }


def snapshot_data(folder: Path, end: int, model: nn.Module) -> list[dict]:
    """Read the snapshots before step `end` of a run, for makeSnapshot() in explain/data.js.

    model: the one shown. Raises UserError if a file is damaged or belongs to a different model.
    """
    like = {"rows": to_8_bits(model.state_dict())}
    data = []
    for step, name in SNAPSHOTS.items():
        path = folder / name
        if step < end and path.exists():
            saved = checkpoint.read_plain(path)
            with refuse_damaged(path, "it is not a snapshot of this model"):
                checkpoint.check_tensors("", saved, like)
            rows = base64.b64encode(saved["rows"].numpy()).decode()
            data.append({"iter": step, "rows": rows})
    return data


def example_text(run: Loaded) -> str:
    """Return the start of the validation split; for pairs, the first source. Returns "" if the data is missing."""
    # only the first document, or the source of the first pair
    text = read_split(run, "val", START_TOKENS).partition(END_OF_TEXT)[0]
    # the split may begin in the middle of a line, so start with the next line
    return text.partition("\n")[2].lstrip() or text


def read_split(run: Loaded, split: str, count: int) -> str:
    """Decode the first tokens of a split of the run's data. Returns "" if the data is missing or has changed."""
    with suppress(UserError):
        folder = Path("data", run.saved["train_config"]["dataset"])
        meta = read_meta(folder)
        if meta["tokenizer"] == run.saved["tokenizer"]:
            ids = TokenFile(folder, split, meta).ids[:count]
            return run.tokenizer.decode(ids).rstrip("\ufffd")  # the last character may be cut off
    return ""


# --------------------------------------------------------------------------------------
# The model


def model_data(model: nn.Module) -> dict:
    """Build the argument for makeModel() in explain/data.js, where both window networks are one kind of model."""
    settings = vars(model.config) | {"embedding": "table"}
    if settings["model"] == "number_mlp":
        settings |= {"model": "window_mlp", "embedding": "number"}
    return {"model": settings, "weights": pack_weights(model)}


def check_data(model: nn.Module) -> dict:
    """Compute the logits of a text, with which agrees() in explain/worker.js compares the page's. Rounds the weights.

    The page has their mean over the tokens, (V,), which differs if one of them does and is much smaller.
    """
    idx = text_to_compare(model.config)
    logits = rounded_logits(model, idx, torch.float16).mean(dim=0)
    return {
        "idx": idx[0].tolist(),
        "logits": base64.b64encode(logits.numpy()).decode(),
    }


def pack_weights(model: nn.Module) -> dict:
    """Pack all tensors, rounded to float16. Returns their names, shapes and offsets, and their bytes in base64.

    The bytes of tied matrices are stored once, and both names refer to them.
    """
    packed = bytearray()
    tensors = []
    placed = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        if p not in placed:
            placed[p] = {"shape": list(p.shape), "offset": len(packed)}
            packed += p.detach().half().numpy().tobytes()
        tensors.append({"name": name, **placed[p]})
    return {"tensors": tensors, "bytes": base64.b64encode(packed).decode()}


# --------------------------------------------------------------------------------------
# Tokenizers


def tokenizer_data(tokenizer: Tokenizer) -> dict:
    """Build the argument for makeTokenizer() in explain/tokenizer.js.

    Of a chat model, it is the tokenizer of the text, with the pieces of the two marks and of whole replies at the end.
    """
    base = getattr(tokenizer, "base", tokenizer)
    if base.name not in TOKENIZERS:
        raise UserError(f"a page cannot read text with tokenizer={base.name}, only with: {', '.join(TOKENIZERS)}")
    data = {
        "name": base.name,
        "eot": tokenizer.eot,
        "alphabet": tokenizer.alphabet,
        "pieces": {
            "bytes": base64.b64encode(b"".join(tokenizer.pieces)).decode(),
            "lengths": [len(piece) for piece in tokenizer.pieces],
        },
    }
    if isinstance(base, SentencePieceTokenizer):
        model = base.model
        scores = merge_scores(model)  # without the tokens to which no text encodes
        # our ids start at sentencepiece's token 1
        data["scores"] = [scores.get(i) for i in range(1, model.vocab_size())]
        data["byte_ids"] = [model.piece_to_id(f"<0x{x:02X}>") - 1 for x in range(256)]
    return data
