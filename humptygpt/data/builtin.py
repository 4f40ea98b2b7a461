"""Built-in data sets: data/NAME.py says where NAME comes from, and how it is prepared by default.

Such a file sets keys of prepare_data.py, as a config file sets keys of train.py, and defines a function

    fetch(config) -> input, description

that downloads or makes the text if it is missing. config: the PrepareConfig. input: a path, as for --input, or files of
pairs, [(split, path)]. description: of the input, for meta.json.
"""

import importlib.util
from pathlib import Path
from types import ModuleType

from humptygpt.cli import CONFIGS, UserError, check_key, convert, fields_of, one_line
from humptygpt.data.settings import PrepareConfig
from humptygpt.files import write_text

FOLDERS = (Path("data"), CONFIGS.parent / "data")  # the current folder's come first
DOWNLOADS = Path("data/downloads")  # data sets made from the same text share it


def data_set(name: str) -> ModuleType | None:
    """Load data/NAME.py. Returns None if there is none."""
    for folder in FOLDERS:
        path = folder / f"{name}.py"
        if path.is_file():
            spec = importlib.util.spec_from_file_location(name, path)
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            return module
    return None


def names() -> list[str]:
    """Return the names of all built-in data sets."""
    return sorted({path.stem for folder in FOLDERS for path in folder.glob("*.py")})


def settings(module: ModuleType) -> dict[str, object]:
    """Return the keys of prepare_data.py that a data set sets. Raises UserError for a name that is not a key."""
    fields = fields_of(PrepareConfig)
    found = {}
    for key, value in vars(module).items():
        helper = isinstance(value, ModuleType) or callable(value)
        if key.islower() and not key.startswith("_") and not helper:
            check_key(key, fields, " (constants of your own are in capitals)")
            found[key] = convert(key, value, fields[key].type)
    return found


def keep(name: str, text: str) -> Path:
    """Write a text to a file in data/downloads. Returns the path of the file.

    If the file has this text already, its modification time stays, so that the data made from it is not made again.
    """
    path = DOWNLOADS / name
    if not path.exists() or path.read_bytes() != text.encode():
        write_text(path, text)
    return path


def hub_files(repo: str, pattern: str, config: PrepareConfig) -> tuple[Path, str]:
    """Download the first files of a data set on the Hugging Face Hub. An interrupted download can be resumed.

    pattern: their names, with {} for the number. Returns a pattern that matches the files, and a description.
    """
    import huggingface_hub  # imported here, since it takes half a second to load

    folder = DOWNLOADS / config.name
    try:
        for name in map(pattern.format, range(config.files)):
            if not (folder / name).exists():
                huggingface_hub.hf_hub_download(repo, name, repo_type="dataset", local_dir=folder)
    except Exception as error:  # from requests or httpx, depending on the version
        raise UserError(f"{repo} cannot be downloaded: {one_line(error)}; run the command again to resume") from error
    return (folder / pattern).parent / "*.parquet", f"{repo}, {config.files} files"
