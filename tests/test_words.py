"""The field's standard terms are the names: in code, help, messages, comments, documents and the names of tests.

A paraphrase cannot be searched for, and a second name for one thing costs every reader a question.
"""

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = ("train", "sample", "prepare_data", "compare", "explain", "export", "bench")
FILES = [ROOT / name for name in ("README.md", "RECORDS.md", "data/README.md")]
FILES += [path for pattern in ("*.py", "humptygpt/*.py", "config/**/*.py") for path in sorted(ROOT.glob(pattern))]
FILES += [path for path in sorted(ROOT.glob("tests/*.py")) if path.name != Path(__file__).name]

# What to write: regular expressions for what not to write instead. A space stands for white space or an underscore.
RULES = {
    "n-grams, frequent n-grams": [
        r"frequent runs",
        r"runs? of (two |up to \d+ |\d+ (to|and) \d+ )?(tokens|characters)",
        r"runs? that occurs?",
        r"(rate|table|vectors) of the runs",
    ],
    "sinusoids; half a cosine": [r"waves?"],
    "embedding dimension, features": [
        r"numbers that stand for",
        r"numbers (wide|of a (token|vector))",
        r"(heads?|vectors?|lists?) of (\d+ )?numbers",
    ],
    "each activation is zeroed with probability p": [
        r"(share|part|tenth|fraction) (p )?of the numbers",
        r"numbers (become|are|is) (0|zero|zeroed)",
        r"single numbers",
    ],
    "bias terms": [r"(learnt|learned|trained|without) shifts"],
    "positions": [r"places?"],
    "probabilities": [r"chances?"],
    "fraction": [r"(a|the|its|this) shares?", r"shares? of", r"share(?=\s*[=:)\]])"],  # not the verb
    "memorised, overfitted; learned": [r"by heart", r"learnt"],
    "optimizer state, decay rate of the first moment": [r"memories", r"memory of (the )?(gradient|square)s?"],
    "set_lr(scale), ema_weights, sample_dtype, resolve": [
        r"set rates",
        r"to_be_used",
        r"writes in(?=\s*[=,:)(])",
        r"settle[sd]?",
    ],
    "log, report, print, show": [r"tells?", r"told", r"said", r"say(?=\()"],
    "tokenizer_vocab_size; built-in": [r"known(?=(=|: int|: bool))", r"(?<=:)known", r"known by name", r"key known"],
    "hypotheses are extended; continue, resume, proceed": [r"beginnings", r"go(es|ing|ne)? on", r"went on"],
    "explicit attention": [r"written-out", r"attention( is)? written out", r"written out attention"],
    "post-norm; after": [r"behind"],
    "dropped and reported; is available; resolved": [r"(counted|dropped) and told", r"to be had", r"open ends?"],
    "plain technical English": [
        r"trace the hash",
        r"(lefts|rights)",
        r"in turn",
        r"so many",
        r"anew",
        r"speaks? for",
        r"no number any more",
        r"at hand",
    ],
    "a message with the value, the rule and the way out": [
        r"this text allows",
        r"leaves \S+ none of",
        r"newest half of it",
        r"whose checkpoint writes",
    ],
}
RULES = {
    term: re.compile(rf"(?<![a-z0-9])({'|'.join(rules)})(?![a-z0-9])".replace(" ", r"\s+"), re.IGNORECASE)
    for term, rules in RULES.items()
}

HONEST = [  # (files, plain English or the standard term for something else)
    ("*", r"in (one|two|three|a|the same) places?"),
    ("*", r"(the (only|one|right)|\w+'s|its|their) place|takes? the place|names the place"),
    ("*.py", r"in[- ]place"),  # of tensors
    ("*", r"(can|cannot) tell|tells? (\w+ ){1,2}(apart|from)|\.tell\(|\.tell\b"),
    ("*", r"behind (torch|one encode)|leaves behind|behind the same interface"),
    ("tests/test_pairs.py", r"He said:"),  # a sentence to translate
    ("humptygpt/checkpoint.py", r"\"memories\""),  # an entry of older checkpoints
]
HONEST = [(files, re.compile(rule.replace(" ", r"\s+"))) for files, rule in HONEST]


def find_words(text: str, name: str = "text.py") -> list[str]:
    """Line, words and the term to write instead, for each use that is not an honest one."""
    spaced = re.sub(r"(?m)^(\s*)#", r"\1 ", text).replace("_", " ")  # as long as text, so that lines stay lines
    excused = [
        range(*match.span())
        for files, rule in HONEST
        if Path(name).match(files)
        for match in [*rule.finditer(text), *rule.finditer(spaced)]
    ]
    found = {}
    for term, rule in RULES.items():
        for match in [*rule.finditer(text), *rule.finditer(spaced)]:
            if not any(match.start() in span and match.end() - 1 in span for span in excused):
                line = text.count("\n", 0, match.start()) + 1
                found[match.start(), term] = f"{name}:{line}: {' '.join(match[0].split())!r}; write: {term}"
    return [found[key] for key in sorted(found)]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_standard_terms_are_the_names(path):
    found = find_words(path.read_text(encoding="utf-8"), str(path.relative_to(ROOT)))
    assert not found, "\n" + "\n".join(found)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_speaks_the_fields_language(script, capsys):
    with pytest.raises(SystemExit):
        importlib.import_module(script).main(["--help"])
    found = find_words(capsys.readouterr().out, f"{script}.py --help")
    assert not found, "\n" + "\n".join(found)


PARAPHRASES = {
    "n-grams, frequent n-grams": "runs of tokens; frequent runs; runs that occur 4 times; runs of 2 to 6 characters",
    "sinusoids; half a cosine": "waves; half a wave",
    "embedding dimension, features": "numbers that stand for a token; 256 numbers wide; four heads of 32 numbers",
    "each activation is zeroed with probability p": "a share p of the numbers becomes 0; the numbers are zeroed",
    "bias terms": "learnt shifts",
    "positions": "all places",
    "probabilities": "the chances of the next token",
    "fraction": "a share of the tokens; share=0.5; with the share",
    "memorised, overfitted; learned": "learnt by heart; known_by_heart",
    "optimizer state, decay rate of the first moment": "memories; AdamW's memory of gradients",
    "set_lr(scale), ema_weights, sample_dtype, resolve": "set_rates(0.5); to_be_used(); writes_in=x; settle(config)",
    "log, report, print, show": "say(bar, line); it tells the loss; told at the start; the_row_tells_it; is said",
    "tokenizer_vocab_size; built-in": "known=65; logits[:, :known]; known by name; every key known",
    "hypotheses are extended; continue, resume, proceed": "beginnings are kept; gone on with; goes_on_with_it",
    "explicit attention": "written-out attention; the attention_written_out",
    "post-norm; after": "norms behind the residuals; one behind the other",
    "dropped and reported; is available; resolved": "dropped, counted and told; is to be had; no_open_ends",
    "plain technical English": "it cannot trace the hash; lefts; rights; in turn; does not speak for Muon; so many",
    "a message with the value, the rule and the way out": "this text allows at least 257 byte-pair tokens; leaves"
    " schedule=cosine none of the 5 steps; the folder of the run whose checkpoint writes",
}


@pytest.mark.parametrize("term", RULES)
def test_each_rule_finds_its_paraphrases_in_prose_and_in_names(term):
    for paraphrase in PARAPHRASES[term].split("; "):
        for text in (
            paraphrase,
            f"# {paraphrase.replace(' ', chr(10) + '# ')}",
            f"test_{paraphrase.replace(' ', '_')}_x",
        ):
            assert any(found.endswith(f"write: {term}") for found in find_words(text)), text


@pytest.mark.parametrize(
    "text",
    [
        "from humptygpt.known_texts import KNOWN",
        "unknown characters; the loss is known; known = set(keys)",
        "heads share keys and values; they share a cache",
        '{"share": 0.1}',
        "weights swapped in place; positions act in three places",
        "file.tell(); attention alone cannot tell the order",
        "wavelengths; placeholder; settings; rightmost; the beginning of the text; each block is written out",
    ],
)
def test_honest_uses_pass(text):
    assert not find_words(text)
