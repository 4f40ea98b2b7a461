"""Log-probabilities of the tokens that a model samples."""

import json
from collections.abc import Iterable

from humptygpt.sampling import Piece, Prompt
from humptygpt.tokenizers import Tokenizer


def print_json_lines(
    pieces: Iterable[Piece], texts: list[tuple[Prompt, int]], k: int, tokenizer: Tokenizer
) -> None:
    """Print each token and the k likeliest tokens at its position. texts: (prompt, sample number)."""
    for row, _, token, logits in pieces:
        if token is None:
            continue
        prompt, sample = texts[row]
        logprobs = logits.log_softmax(dim=-1)
        likeliest = logprobs.topk(min(k, len(logprobs))).indices.tolist()
        chosen, *top = [
            {
                "token": i,
                "text": tokenizer.pieces[i].decode("utf-8", "replace"),
                "logprob": round(float(logprobs[i]), 6),
            }
            for i in (token, *likeliest)
        ]
        line = {"prompt": prompt.number, "sample": sample} | chosen | {"top": top}
        print(json.dumps(line, ensure_ascii=False), flush=True)
