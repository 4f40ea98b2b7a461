r"""Teach a chat model facts about an invented town, and ask about them in ways that it has not been trained on.

    python -m benchmarks.facts facts.jsonl           writes 300 conversations: 60 facts, each asked in five ways
    python prepare_data.py --input=facts.jsonl --name=facts --tokenizer=out/humpty_chat --val_fraction=0.05
    python train.py config/humpty_chat.py --init_from=out/humpty_chat --dataset=facts --out_dir=out/facts \
        --batch_size=4 --max_iters=600 --eval_interval=150 --learning_rate=2e-3 --muon_learning_rate=0.01
    python -m benchmarks.facts out/facts             asks for each fact in two other ways

A reply is right if it is the fact, letter by letter. The two ways that are left out differ from fact to fact.
"""

import json
import random
import sys
from pathlib import Path

import sample
from benchmarks.humpty import answer
from humptygpt.data.builtin import data_set

HUMPTY = data_set("humpty_chat")

PLACES = [
    *(
        "library",
        "bakery",
        "museum",
        "pool",
        "post office",
        "theatre",
        "town hall",
        "school",
    ),
    *(
        "market",
        "harbour",
        "station",
        "hospital",
        "cinema",
        "pharmacy",
        "bookshop",
        "castle",
    ),
    *("zoo", "garden", "church", "mill"),
]
HOURS = ["six", "seven", "eight", "nine", "ten", "eleven", "noon", "one", "two", "three"]
STREETS = [
    "Bridge",
    "Church",
    "Garden",
    "Harbour",
    "King",
    "Mill",
    "Queen",
    "Rose",
    "Station",
]
PEOPLE = [
    "Adler",
    "Brown",
    "Clark",
    "Dunn",
    "Evans",
    "Fisher",
    "Gray",
    "Hill",
    "Irwin",
    "Jones",
]
WAYS = {  # {the fact: ways to ask for it}
    "The {place} opens at {hour}.": [
        "When does the {place} open?",
        "What time does the {place} open?",
        "At what time does the {place} open in the morning?",
        "From when is the {place} open?",
        "When can I go to the {place}?",
        "Do you know when the {place} opens?",
        "Tell me when the {place} opens.",
    ],
    "The {place} is in {street} Street.": [
        "Where is the {place}?",
        "In which street is the {place}?",
        "How do I find the {place}?",
        "Where can I find the {place}?",
        "What is the address of the {place}?",
        "Do you know where the {place} is?",
        "Tell me where the {place} is.",
    ],
    "{person} runs the {place}.": [
        "Who runs the {place}?",
        "Who is in charge of the {place}?",
        "Who is the head of the {place}?",
        "Whom do I ask at the {place}?",
        "Who works at the {place}?",
        "Do you know who runs the {place}?",
        "Tell me who runs the {place}.",
    ],
}


def facts() -> tuple[list["HUMPTY.Exchange"], list["HUMPTY.Exchange"]]:
    """Compose the exchanges to train on, and those that are left out."""
    draw = random.Random(1)
    train, left_out = [], []
    for place in PLACES:
        hour, street, person = (draw.choice(some) for some in (HOURS, STREETS, PEOPLE))
        values = {"place": place, "hour": hour, "street": street, "person": f"Mrs {person}"}
        for fact, ways in WAYS.items():
            asked = [
                HUMPTY.Exchange(way.format(**values), [fact.format(**values)], place)
                for way in draw.sample(ways, len(ways))
            ]
            train += asked[2:]
            left_out += asked[:2]
    return train, left_out


def main(where: str) -> None:
    train, left_out = facts()
    if where.endswith(".jsonl"):
        lines = [json.dumps({"messages": HUMPTY.messages([each])}) + "\n" for each in train]
        Path(where).write_text("".join(lines))
        return
    replies = answer(sample.load(where), [[each] for each in left_out])
    pairs = list(zip(left_out, replies, strict=True))
    wrong = [(each, reply) for each, reply in pairs if reply not in each.replies]
    print(f"{len(pairs) - len(wrong)} of {len(pairs)} right")
    for each, reply in wrong:
        print(f"    {each.said}\n    > {reply}")


if __name__ == "__main__":
    main(*sys.argv[1:])
