"""Log-probabilities of the tokens that a model samples."""

import json
from collections.abc import Iterable

from humptygpt.sampling import Piece, Prompt
from humptygpt.tokenizers import Tokenizer


def print_json_lines(
    pieces: Iterable[Piece], texts: list[tuple[Prompt, int]], k: int, tokenizer: Tokenizer
) -> None:
    """Print each token and the k likeliest tokens at its position. texts: (prompt, sample number)."""
    for piece in pieces:
        if piece.token is None:
            continue
        prompt, sample = texts[piece.row]
        chosen, *top = [
            {
                "token": i,
                "text": tokenizer.pieces[i].decode("utf-8", "replace"),
                "logprob": round(logprob, 6),
            }
            for i, logprob in with_likeliest(piece, k)
        ]
        line = {"prompt": prompt.number, "sample": sample} | chosen | {"top": top}
        print(json.dumps(line, ensure_ascii=False), flush=True)


def with_likeliest(piece: Piece, k: int) -> list[tuple[int, float]]:
    """Return a piece's token and the k likeliest tokens at its position, each with its log-probability."""
    logprobs = piece.logits.log_softmax(dim=-1)
    likeliest = logprobs.topk(min(k, len(logprobs))).indices.tolist()
    return [(i, float(logprobs[i])) for i in (piece.token, *likeliest)]
