"""Everyday sentence pairs out of the German-English dictionary in the Debian package trans-de-en.

A line is "German :: English". Both sides have the same number of forms, separated by "|": the headword, inflected
forms, phrases and sentences. A form has synonyms, separated by ";", and choices of words, "er/sie geht". Annotations
are {grammar}, <spelling>, (explanation or optional words), /ABBREVIATION/ and [label] of a field, region or register.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

from humptygpt.configurator import UserError
from humptygpt.documents import read_lines

ANNOTATION = re.compile(r"\{[^{}]*\}|<[^<>]*>|\([^()]*\)|(?<!\S)/[^\s/]+/(?![^\s;])")
LABEL = re.compile(r"\[[^][]*\]")
# Labels of fields whose phrases nobody uses in everyday life, and of synonyms that a learner should not imitate.
TECHNICAL = re.compile(
    r"\[(adm|agr|anat|arch|astron|aviat|biochem|biol|bot|chem|comp|constr|econ|electr|envir|fin|geogr|geol|hist|jur|ling"
    r"|mach|math|med|mil|min|myc|naut|ornith|pharm|phil|phys|pol|print|psych|relig|sci|statist|techn|telco|zool)\.?\]"
)
UNUSUAL = re.compile(
    r"\[(alt|altertümlich|archaic|dated|obs|pej|poet|rare|selten|slang|veraltend|veraltet|vulg|Sprw|prov"
    r"|Austr|Bayr|Can|Ir|Mitteldt|NZ|Norddt|Ostdt|Sc|Schw|Süddt|Südtirol|Westdt|Westös|Ös)\.?\]"
)
PLACEHOLDERS = {"jd.": "jemand", "jdn.": "jemanden", "jdm.": "jemandem", "jds.": "jemandes", "sb.": "somebody"}
PLACEHOLDERS |= {"etw.": "etwas", "sth.": "something"}  # after persons, who are preferred in jdn./etw.
PLACEHOLDER = re.compile(r"\b(jd[nms]?|etw|sb|sth)\.( ?/ ?(jd[nms]?|etw|sb|sth)\.)*")
OBJECT = re.compile(r"^(etwas|jemanden|jemandem|sich) (?=\w+$)| (something|somebody|oneself|yourself)\b")
LETTERS = r"(?:[^\W\d_][^\W\d_'-][\w'-]*|I|a)"  # at least two, so that km/h is no choice
CHOICE = re.compile(rf"(?<![\w/]){LETTERS}(?:/{LETTERS})+(?![\w/])")
SENTENCE = re.compile(r"[„“”\"‘']?[^\W\d_a-zäöüß][^][{}()<>/|;…~*=+@#_]*[.!?][“”\"’']?")
PHRASE = re.compile(r"[^\W\d_][\w ,'-]*[^\W_]")
SUBJECTS = (re.compile(r"(ich|du|er|sie|es|wir|ihr)[/ ]"), re.compile(r"(I|you|he|she|it|we|they)[/ ]"))
WORDS = re.compile(r"\w+(?:[-']\w+)*")
LONGEST = 25  # words of a sentence; the few that are longer are laws, oaths and prayers


def dictionary_lines(path: Path) -> Iterator[str]:
    for line, _ in read_lines(path, "replace"):
        if "\N{REPLACEMENT CHARACTER}" in line:
            raise UserError(f"{path} is not UTF-8; convert it, for example: iconv -f latin1 -t utf-8 {path}")
        yield line.rstrip("\r\n")


def everyday_pairs(dictionary: Path) -> dict[str, list[tuple[str, str]]]:
    """{kind: (German, English) pairs, none twice}, the everyday ones: the dictionary's own sentences decide what is.

    Kept are all sentences but the longest; clauses and phrases whose every word, on both sides, occurs twice in these;
    words that occur twice in sentences and phrases, with the translations that a tenth or more of those pairs use.
    """
    found = {"sentence": {}, "clause": {}, "phrase": {}}  # a dictionary has every pair once, in the order of the file
    for kind, *pair in dictionary_pairs(dictionary_lines(dictionary)):
        found[kind][tuple(pair)] = None
    if not found["sentence"]:
        raise UserError(
            f"{dictionary} is not the dictionary trans-de-en: it has no sentences in lines German :: English"
        )
    everyday = {"sentence": [pair for pair in found["sentence"] if max(len(side.split()) for side in pair) <= LONGEST]}
    used = [Counter(word for pair in everyday["sentence"] for word in words(pair[side])) for side in (0, 1)]
    for kind in ("clause", "phrase"):
        everyday[kind] = [
            pair for pair in found[kind] if all(used[side][word] > 1 for side in (0, 1) for word in words(pair[side]))
        ]
    everyday["word"] = used_translations(dictionary_lines(dictionary), [*everyday["sentence"], *found["phrase"]])
    return everyday


def words(text: str) -> list[str]:
    return WORDS.findall(text.lower())


def dictionary_pairs(lines: Iterable[str]) -> Iterator[tuple[str, str, str]]:
    """(kind, German, English) of a dictionary's sentences, clauses and phrases.

    A clause is an inflected form with its subject, made a sentence: "er/sie geht" gives "Er geht." and "Sie geht."
    Sentences and phrases with choices are left out, since how many words of "take it/leave us" a choice concerns is
    nowhere marked.
    """
    for form, technical in dictionary_forms(lines):
        if TECHNICAL.search("".join(form)):
            continue
        synonyms = [synonyms_of(side) for side in form]
        for pair in aligned(*(matching(SENTENCE, side) for side in synonyms)):
            yield "sentence", *pair
        if technical:
            continue
        for pair in aligned(*(matching(PHRASE, side) for side in synonyms)):
            if " " in OBJECT.sub("", pair[0]) and not has_subject(pair):
                yield "phrase", *pair
        for clause in filter(has_subject, aligned(*synonyms)):
            for pair in aligned(*map(choices, clause)):
                if all(map(PHRASE.fullmatch, pair)):
                    yield "clause", *(f"{side[0].upper()}{side[1:]}." for side in pair)


def matching(pattern: re.Pattern, synonyms: list[str]) -> list[str]:
    return [synonym if pattern.fullmatch(synonym) else "" for synonym in synonyms]


def has_subject(pair: tuple[str, str]) -> bool:
    return all(subject.match(side) for subject, side in zip(SUBJECTS, pair, strict=True))


def dictionary_forms(lines: Iterable[str]) -> Iterator[tuple[tuple[str, str], bool]]:
    """((German, English) form, whether the headword of its line is technical)."""
    for line in lines:
        german, separator, english = line.partition(" :: ")
        forms = german.split(" | "), english.split(" | ")
        if not line.startswith("#") and separator and len(forms[0]) == len(forms[1]):
            technical = TECHNICAL.search(forms[0][0] + forms[1][0]) is not None
            yield from ((form, technical) for form in zip(*forms, strict=True))


def synonyms_of(text: str) -> list[str]:
    """The synonyms in a form, without annotations; an unusual one is empty, so that the others keep their positions."""
    before = None
    while before != text:  # brackets can be nested
        before, text = text, ANNOTATION.sub("", text)
    found = []
    for synonym in re.split(r";|(?<=[.!?]) / ", text):
        plain = PLACEHOLDER.sub(spell_out, LABEL.sub("", synonym).replace("’", "'"))
        plain = re.sub(r" (?=[,.:!?])", "", " ".join(plain.split()))
        found.append("" if UNUSUAL.search(synonym) else plain)
    return found


def spell_out(match: re.Match) -> str:
    return next(full for short, full in PLACEHOLDERS.items() if short in re.split(" ?/ ?", match[0]))


def choices(text: str) -> list[str]:
    """The texts that "er/sie hat/hatte" stands for, as few as have every word: er hat, sie hatte."""
    most = max((choice.count("/") for choice in CHOICE.findall(text)), default=0)
    return [CHOICE.sub(partial(chosen, number), text) for number in range(most + 1)]


def chosen(number: int, match: re.Match) -> str:
    return (options := match[0].split("/"))[min(number, len(options) - 1)]


def aligned(german: list[str], english: list[str]) -> list[tuple[str, str]]:
    """Pairs without an empty side: in order where there are as many of both, else all German with the first English."""
    if len(german) != len(english):
        english = [next(filter(None, english), "")] * len(german)
    return [pair for pair in zip(german, english, strict=True) if all(pair)]


def used_translations(lines: Iterable[str], pairs: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """(German word, translation in the dictionary), as in everyday_pairs; pairs: the sentences and phrases."""
    seen = Counter(word for german, _ in pairs for word in set(WORDS.findall(german)))
    seen = {word: count for word, count in seen.items() if count > 1 and len(word) > 1}
    translations = {}  # of a word; a dictionary, which keeps their order
    for form, _ in dictionary_forms(lines):
        german, english = map(synonyms_of, form)
        for word in (OBJECT.sub("", synonym) for synonym in german):
            if word in seen:
                every = (OBJECT.sub("", choice) for synonym in english for choice in choices(synonym))
                translations.setdefault(word, {}).update(dict.fromkeys(every))
    used = Counter()
    for german, english in pairs:
        spaced = f" {' '.join(words(english))} "
        for word in set(WORDS.findall(german)) & translations.keys():
            used.update((word, en) for en in translations[word] if f" {en.lower().removeprefix('to ')} " in spaced)
    return [(word, en) for word in translations for en in translations[word] if used[word, en] >= seen[word] / 10]
