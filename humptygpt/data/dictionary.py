"""Everyday sentence pairs out of the German-English dictionary in the Debian package trans-de-en.

A line is "German :: English". Both sides have the same number of forms, separated by "|": the headword, inflected
forms, phrases and sentences. A form has synonyms, separated by ";", and choices of words, "er/sie geht". Annotations
are {grammar}, <spelling>, (explanation or optional words), /ABBREVIATION/ and [label] of a field, region or register.
"""

import re
import shlex
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path

from humptygpt.core.errors import UserError
from humptygpt.data.documents import read_lines
from humptygpt.data.grammar import (
    HABEN,
    SEIN,
    Adjective,
    Noun,
    Verb,
    Words,
    Writer,
    english_third,
    finite,
    stem_of,
    with_t,
)

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
PLACEHOLDERS = {
    "jd.": "jemand",
    "jdn.": "jemanden",
    "jdm.": "jemandem",
    "jds.": "jemandes",
    "sb.": "somebody",
}
PLACEHOLDERS |= {
    "etw.": "etwas",
    "sth.": "something",
}  # after persons, who are preferred in jdn./etw.
PLACEHOLDER = re.compile(r"\b(jd[nms]?|etw|sb|sth)\.( ?/ ?(jd[nms]?|etw|sb|sth)\.)*")
OBJECT = re.compile(
    r"^(etwas|jemanden|jemandem|sich) (?=\w+$)| (something|somebody|oneself|yourself)\b"
)
LETTERS = r"(?:[^\W\d_][^\W\d_'-][\w'-]*|I|a)"  # at least two, so that km/h is no choice
CHOICE = re.compile(rf"(?<![\w/]){LETTERS}(?:/{LETTERS})+(?![\w/])")
SENTENCE = re.compile(r"[„“”\"‘']?[^\W\d_a-zäöüß][^][{}()<>/|;…~*=+@#_]*[.!?][“”\"’']?")
PHRASE = re.compile(r"[^\W\d_][\w ,'-]*[^\W_]")
SUBJECTS = (
    re.compile(r"(ich|du|er|sie|es|wir|ihr)[/ ]"),
    re.compile(r"(I|you|he|she|it|we|they)[/ ]"),
)
WORDS = re.compile(r"\w+(?:[-']\w+)*")
USUAL = 0.1  # fraction of a word's pairs from which on a translation counts
LONGEST = 25  # words of a sentence; the few that are longer are laws, oaths and prayers


def dictionary_lines(path: Path) -> Iterator[str]:
    for line, _ in read_lines(path, "replace"):
        if "\N{REPLACEMENT CHARACTER}" in line:
            raise UserError(
                f"{path} is not UTF-8; convert it, for example: iconv -f latin1 -t utf-8 {shlex.quote(str(path))}"
            )
        yield line.rstrip("\r\n")


def everyday_pairs(
    dictionary: Path, german_texts: Iterable[str] = ()
) -> dict[str, list[tuple[str, str]]]:
    """{kind: (German, English) pairs, none twice}, the everyday ones: the dictionary's own sentences decide what is.

    Kept are all sentences but the longest; clauses and phrases whose every word, on both sides, occurs twice in these;
    words that occur twice in sentences and phrases, with the translations that a tenth or more of those pairs use; and
    sentences that grammar.py makes of such words. german_texts: others in which words are in use.
    """
    found = {
        "sentence": {},
        "clause": {},
        "phrase": {},
    }  # a dictionary has every pair once, in the order of the file
    lines = list(dictionary_lines(dictionary))
    for kind, *pair in dictionary_pairs(lines):
        found[kind][tuple(pair)] = None
    if not found["sentence"]:
        raise UserError(
            f"{dictionary} is not the dictionary trans-de-en: it has no sentences in lines German :: English"
        )
    everyday = {
        "sentence": [
            pair for pair in found["sentence"] if max(len(side.split()) for side in pair) <= LONGEST
        ]
    }
    used = [
        Counter(word for pair in everyday["sentence"] for word in words(pair[side]))
        for side in (0, 1)
    ]
    for kind in ("clause", "phrase"):
        everyday[kind] = [
            pair
            for pair in found[kind]
            if all(used[side][word] > 1 for side in (0, 1) for word in words(pair[side]))
        ]
    in_use = [*everyday["sentence"], *found["phrase"]]
    shares = translation_shares(lines, in_use)
    everyday["word"] = [
        (word, en)
        for word, found in shares.items()
        for en, share in found.items()
        if share >= USUAL
    ]
    texts = chain((german for german, _ in in_use), german_texts)
    words_in_use = Counter(word for text in texts for word in WORDS.findall(text))
    writer = Writer(vocabulary(lines, shares, words_in_use))
    everyday["generated sentence"] = writer.sentences(GENERATED)
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
    for german, english, technical in dictionary_entries(lines):
        yield from ((form, technical) for form in zip(german, english, strict=True))


def dictionary_entries(lines: Iterable[str]) -> Iterator[tuple[list[str], list[str], bool]]:
    """(German forms, as many English ones, whether the headword is technical) of each line that has an entry."""
    for line in lines:
        german, separator, english = line.partition(" :: ")
        german, english = german.split(" | "), english.split(" | ")
        if not line.startswith("#") and separator and len(german) == len(english):
            yield german, english, TECHNICAL.search(german[0] + english[0]) is not None


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
    return next(
        full for short, full in PLACEHOLDERS.items() if short in re.split(" ?/ ?", match[0])
    )


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


def translation_shares(
    lines: Iterable[str], pairs: list[tuple[str, str]]
) -> dict[str, dict[str, float]]:
    """{German word: {translation in the dictionary: fraction of the word's pairs that have it}}; pairs: in use.

    Of the words that occur in two of the pairs.
    """
    seen = Counter(word for german, _ in pairs for word in set(WORDS.findall(german)))
    seen = {word: count for word, count in seen.items() if count > 1 and len(word) > 1}
    translations = {}  # of a word; a dictionary, which keeps their order
    for form, _ in dictionary_forms(lines):
        german, english = map(synonyms_of, form)
        for word in (OBJECT.sub("", synonym) for synonym in german):
            if word in seen:
                every = (
                    OBJECT.sub("", choice) for synonym in english for choice in choices(synonym)
                )
                translations.setdefault(word, {}).update(dict.fromkeys(every, 0))
    for german, english in pairs:
        spaced = f" {' '.join(words(english))} "
        for word in set(WORDS.findall(german)) & translations.keys():
            for en in translations[word]:
                translations[word][en] += f" {en.lower().removeprefix('to ')} " in spaced
    return {
        word: {en: n / seen[word] for en, n in found.items()}
        for word, found in translations.items()
    }


# --------------------------------------------------------------------------------------
# A vocabulary for grammar.py

GENERATED = 45_000  # sentences, a few of them the same
LEAST_USE = 5  # of a word in all its forms
GENDER = re.compile(r"([A-ZÄÖÜ][\wäöüß]+) \{([mfn])\}")
ADJECTIVE = re.compile(r"([a-zäöüß]+) \{adj\}")
PREFIXES = [
    "ab",
    "an",
    "auf",
    "aus",
    "bei",
    "ein",
    "fest",
    "her",
    "hin",
    "los",
    "mit",
    "nach",
    "um",
    "vor",
    "weg",
]
PREFIXES += ["weiter", "zu", "zurück", "zusammen"]
THIRD = re.compile(r"er/sie(?:/es)? (\w+)(?: (\w+))?")
KINDS = {"etwas ": "thing", "jemanden ": "person", "jemandem ": "dative", "sich ": "reflexive"}


def vocabulary(lines: Iterable[str], shares: dict[str, dict[str, float]], in_use: Counter) -> Words:
    """The verbs, nouns and adjectives that are in use, each with its translation that is used most.

    shares: as from translation_shares; in_use: how often each word is. The commonest words are to be used less than
    that, so that there is room for others.
    """
    verbs, nouns, adjectives = {}, {}, {}
    usage = lambda verb: shares.get(verb.infinitive, {}).get(f"to {verb.base}", 0.0)  # noqa: E731
    for german, english, technical in dictionary_entries(lines):
        if technical:
            continue
        if re.search(r"\{v[itr]?\}", german[0]):
            verb = read_verb(german, english, shares)
            if verb and (
                verb.infinitive not in verbs or usage(verb) > usage(verbs[verb.infinitive][0])
            ):
                forms = {
                    verb.infinitive,
                    verb.participle,
                }  # a separated prefix is not seen beside its verb
                forms |= set() if verb.prefix else {finite(verb, person) for person in range(5)}
                verbs[verb.infinitive] = verb, sum(in_use[form] for form in forms if form)
            continue
        for kind, (pattern, found) in enumerate(((GENDER, nouns), (ADJECTIVE, adjectives))):
            match = pattern.match(german[0])
            if match and match[1] not in found and (translation := most_used(match[1], shares)):
                word = (
                    Noun(*match.groups(), translation)
                    if kind == 0
                    else Adjective(match[1], translation)
                )
                found[match[1]] = word, in_use[match[1]]
    kinds = (verbs, nouns, adjectives)
    return Words(
        *({word: n**0.5 for word, n in found.values() if n >= LEAST_USE} for found in kinds)
    )


def most_used(word: str, shares: dict[str, dict[str, float]]) -> str | None:
    """The translation of one or two words that most of the word's pairs have, if a tenth have it."""
    found = {
        en: share
        for en, share in shares.get(word, {}).items()
        if re.fullmatch("[a-z]+( [a-z]+)?", en)
    }
    best = max(found, key=found.get, default=None)
    return best if best and found[best] >= USUAL else None


def read_verb(
    german: list[str], english: list[str], shares: dict[str, dict[str, float]]
) -> Verb | None:
    """The verb that a line's forms describe; None where they do not say how it is conjugated."""
    head = synonyms_of(german[0])[0]
    kind = next((kind for start, kind in KINDS.items() if head.startswith(start)), None)
    infinitive = head.split(" ")[-1]
    if len(head.split(" ")) > (2 if kind else 1) or not infinitive.endswith("n"):
        return None
    translations = [OBJECT.sub("", synonym) for synonym in synonyms_of(english[0])]
    rank = shares.get(infinitive, {})
    number = max(range(len(translations)), key=lambda i: rank.get(translations[i], 0.0))
    base = translations[number].removeprefix("to ")
    if (
        not re.fullmatch("[a-z]+( [a-z]+)?", base)
        or base == translations[number]
        or base.split()[0] == "be"
    ):
        return None
    first = [synonyms_of(form)[0] for form in german]  # the forms of the first synonym
    participle = first[2] if len(first) > 2 and " " not in first[2] else None
    second = next(
        (form.split(" ")[1] for form in first if re.fullmatch(r"du \w+( \w+)?", form)), None
    )
    third = next((match for form in first if (match := THIRD.fullmatch(form))), None)
    if third and third[1] not in ("hat", "ist") and infinitive.startswith(third[2] or ""):
        prefix, third = third[2] or "", third[1]
    elif second:  # du isst, er isst; du kommst, er kommt
        prefix, third = (
            "",
            second if re.search("[sßxz]e?n$", infinitive) else second.removesuffix("st") + "t",
        )
    elif not (participle and (weak := conjugate_weak(infinitive, participle))):
        return None
    else:
        prefix, third = weak
    perfect = "".join(form for form in first if re.match(r"er/sie(/es)? (hat|ist)/", form))
    takes_haben = perfect or "{vt}" in german[0] or kind == "reflexive"
    auxiliary = SEIN if "ist/war" in perfect else HABEN if takes_haben else None
    past = past_tense(base, number, english)
    kind = kind or ("thing" if "{vt}" in german[0] else "none")
    return Verb(infinitive, prefix, third, second, participle, auxiliary, kind, base, past)


def conjugate_weak(infinitive: str, participle: str) -> tuple[str, str] | None:
    """(separable prefix, third person) of a regular verb, recognised by its participle; None of others."""
    for prefix in ["", *PREFIXES]:
        if infinitive.startswith(prefix):
            third = with_t(stem_of(infinitive.removeprefix(prefix)))
            if participle == f"{prefix}ge{third}" or (not prefix and participle == third):
                return prefix, third
    return None


def past_tense(base: str, number: int, english: list[str]) -> str | None:
    """Of synonym `number` in a line's English forms; None where they do not show it."""
    word, space, rest = base.partition(" ")
    synonym = re.split(r";(?![^{]*\})", english[0])
    if number < len(synonym) and (irregular := re.search(r"\{(\w+)", synonym[number])):
        return irregular[1] + space + rest
    for form in english[2:]:
        parts = synonyms_of(form)
        match = number < len(parts) and re.fullmatch(
            r"(?:I/)?he/she(?:/it)? ((\w+)( \w+)?)", parts[number]
        )
        if match and match[2] not in (english_third(word), "has", "is", "would"):
            return match[1]
    parts = synonyms_of(english[2]) if len(english) > 2 else []
    return (
        parts[number]
        if number < len(parts) and re.fullmatch(r"\w+ed( \w+)?", parts[number])
        else None
    )
