"""Small texts and sentence pairs for tests: made up here, the same every time."""

import random


def make_text(length: int = 4000, seed: int = 0) -> str:
    """Lines of a made-up language, the same for the same seed."""
    draw = random.Random(seed)
    words = [
        "".join(draw.choice("aeiou") + draw.choice("klmnprst") for _ in range(draw.randint(1, 3))) for _ in range(60)
    ]
    lines = (" ".join(draw.choices(words, k=draw.randint(3, 8))).capitalize() + "." for _ in iter(int, 1))
    text = ""
    while len(text) < length:
        text += next(lines) + "\n"
    return text[:length]


PAIRS = """
Wo wohnst du?|Where do you live?
Ich wohne in Berlin.|I live in Berlin.
Wie heißt du?|What is your name?
Mein Name ist Anna.|My name is Anna.
Das Wasser ist kalt.|The water is cold.
Das Haus ist groß.|The house is big.
Der Hund schläft.|The dog is sleeping.
Die Katze trinkt Milch.|The cat drinks milk.
Er liest ein Buch.|He is reading a book.
Sie schreibt einen Brief.|She is writing a letter.
Wir gehen nach Hause.|We are going home.
Kommst du mit?|Are you coming along?
Ich habe Hunger.|I am hungry.
Ich habe Durst.|I am thirsty.
Was kostet das?|How much is it?
Das ist zu teuer.|That is too expensive.
Guten Morgen!|Good morning!
Gute Nacht!|Good night!
Bis morgen!|See you tomorrow!
Vielen Dank!|Thank you very much!
Heute regnet es!|It is raining today!
Morgen scheint die Sonne.|The sun will shine tomorrow.
Der Zug ist spät.|The train is late.
Der Bus fährt um neun.|The bus leaves at nine.
Wann kommt der Zug?|When does the train come?
Wo ist der Bahnhof?|Where is the station?
Die Straße ist lang.|The street is long.
Das Kind spielt im Garten.|The child is playing in the garden.
Die Kinder singen ein Lied.|The children are singing a song.
Meine Mutter kocht Suppe.|My mother is cooking soup.
Mein Vater arbeitet viel.|My father works a lot.
Meine Schwester ist klein.|My sister is small.
Sein Bruder ist alt.|His brother is old.
Das Brot ist frisch.|The bread is fresh.
Ich esse einen Apfel.|I am eating an apple.
Wir trinken Tee.|We are drinking tea.
Der Tee ist heiß.|The tea is hot.
Das Buch ist neu.|The book is new.
Die Tür ist offen.|The door is open.
Mach die Tür zu!|Close the door!
Öffne das Fenster!|Open the window!
Ich verstehe dich nicht.|I do not understand you.
Sprichst du Deutsch?|Do you speak German?
Ich lerne Englisch.|I am learning English.
Das Bild ist schön.|The picture is beautiful.
Der Baum ist hoch.|The tree is tall.
Die Blume ist rot.|The flower is red.
Der Himmel ist blau.|The sky is blue.
Das Gras ist grün.|The grass is green.
Der Schnee ist weiß.|The snow is white.
Die Nacht ist dunkel.|The night is dark.
Ich bin müde.|I am tired.
Bist du krank?|Are you ill?
Sie ist glücklich.|She is happy.
Er hat keine Zeit.|He has no time.
Wir haben ein Auto.|We have a car.
Das Auto ist schnell.|The car is fast.
Wer ist da?|Who is there?
Niemand ist da.|Nobody is there.
Alles ist gut.|All is well.
"""


def make_pairs() -> list[tuple[str, str]]:
    """60 short German sentences and their English translations, each German one once."""
    return [tuple(line.split("|")) for line in PAIRS.split("\n") if line]
