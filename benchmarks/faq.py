"""A bot from one file: 40 answers of a bicycle shop in benchmarks/faq.txt, each asked for in seven ways.

    python -m benchmarks.faq faq.jsonl               write the first five ways of each, to train on
    python train.py --input=faq.jsonl --minutes=5
    python serve.py --out_dir=out/faq
    python -m benchmarks.faq http://127.0.0.1:8000   ask the other two ways, and count the right answers

The other ways were written before any training. An answer is right if it is the true one, letter by letter.
"""

import json
import sys
import urllib.request
from pathlib import Path

FAQ = Path(__file__).parent / "faq.txt"
TAUGHT = 5  # ways of asking for each answer
ODD = (
    "DO YOU FIX PUNCTURES???",
    "Où est le magasin, s'il vous plaît ? Vélo?",
    "Can I rent a helmet ⛑?",
    "hi 👋",
)


def blocks() -> list[tuple[str, list[str]]]:
    """Read each answer, and the ways of asking for it."""
    lines = (block.split("\n") for block in FAQ.read_text("utf-8").strip().split("\n\n"))
    return [(answer, ways) for answer, *ways in lines]


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def ask(address: str, question: str) -> str:
    """Ask a server, greedily."""
    body = {"messages": [turn("user", question)], "temperature": 0}
    url = f"{address}/v1/chat/completions"
    with urllib.request.urlopen(url, json.dumps(body).encode()) as answer:
        return json.load(answer)["choices"][0]["message"]["content"]


def main(where: str) -> None:
    if where.endswith(".jsonl"):
        taught = [(way, answer) for answer, ways in blocks() for way in ways[:TAUGHT]]
        chats = [[turn("user", way), turn("assistant", answer)] for way, answer in taught]
        lines = [json.dumps({"messages": chat}) + "\n" for chat in chats]
        Path(where).write_text("".join(lines))
        return
    held_out = [(way, answer) for answer, ways in blocks() for way in ways[TAUGHT:]]
    replies = [(way, answer, ask(where, way)) for way, answer in held_out]
    wrong = [(way, reply) for way, answer, reply in replies if reply != answer]
    print(f"{len(held_out) - len(wrong)} of {len(held_out)} right")
    for way, reply in wrong + [(way, ask(where, way)) for way in ODD]:
        print(f"    {way}\n    > {reply}")


if __name__ == "__main__":
    main(*sys.argv[1:])
