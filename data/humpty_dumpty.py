"""The nursery rhyme, ten times over: a text that is learned by heart in seconds."""

from humptygpt.data.builtin import keep

RHYME = """
Humpty Dumpty sat on a wall,
Humpty Dumpty had a great fall;
All the king's horses and all the king's men
Couldn't put Humpty together again.
"""
# ten times over, so that the last tenth, the validation split, is the complete rhyme
RHYMES = 10 * RHYME

tokenizer = "char"


def fetch(config):
    return keep("humpty_dumpty.txt", RHYMES), "Humpty Dumpty, ten times over"
