"""Models of the Hugging Face hub, by their names: fetched by HTTPS into a folder, resumed, and verified.

HF_ENDPOINT names another address, such as a mirror's; HF_TOKEN opens models that ask for it; HF_HOME is where the
models are kept instead of data/downloads. A few requests do, without a package.
"""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from humptygpt.core.download import HTTPFailure, download
from humptygpt.core.errors import UserError
from humptygpt.core.files import write_whole
from humptygpt.core.schema import parse_json

ENDPOINT = "https://huggingface.co"
GPT2 = {
    name: f"openai-community/{name}" for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
}
REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
TEXT_FILES = {
    "config.json",
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "tokenizer_config.json",
}
TEXT_FILES |= {"special_tokens_map.json", "added_tokens.json"}
WEIGHTS = [
    r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?",
    r"pytorch_model(-\d+-of-\d+)?\.bin(\.index\.json)?",
]
SIZE = range(2**53)
FILE = {"rfilename": str, "size?": (SIZE, None), "lfs?": ({"sha256?": str, "size?": SIZE}, None)}
LISTING = {"siblings": [FILE], "sha?": str}
COMPLETE, TEXT_COMPLETE = (
    "hub.json",
    "hub-text.json",
)  # {file: size}, written when all are there, or all but weights


def repository(name: str) -> str | None:
    """owner/model, if the name can stand for a model of the hub; a path that begins in a folder here cannot."""
    if name in GPT2:
        return GPT2[name]
    owner = name.partition("/")[0]
    local = owner in ("out", "data") or os.path.exists(owner)
    return name if REPOSITORY.fullmatch(name) and not local else None


def fetch_model(repo: str, check_config: Callable[[Path], object]) -> Path:
    """The folder of a model, in Hugging Face's format, fetched if it is not complete yet. Raises UserError.

    check_config: what raises UserError for a folder with a config.json that is not supported, before the weights come.
    """
    return fetch(repo, COMPLETE, check_config)


def fetch_tokenizer(repo: str) -> Path:
    """The same folder with everything but the weights."""
    return fetch(repo, TEXT_COMPLETE, lambda folder: None)


def fetch(repo: str, complete: str, check_config: Callable[[Path], object]) -> Path:
    """complete: COMPLETE or TEXT_COMPLETE."""
    home = os.environ.get("HF_HOME")
    folder = (Path(home, "humptygpt") if home else Path("data", "downloads")) / repo.replace(
        "/", "--"
    )
    if is_complete(folder, complete):
        return folder
    endpoint = os.environ.get("HF_ENDPOINT", "").rstrip("/") or ENDPOINT
    try:
        files, revision = list_files(repo, endpoint, folder, weights=complete == COMPLETE)
        for name in sorted(files, key=lambda name: name != "config.json"):
            size, sha256 = files[name]
            path = folder / name
            if not (path.exists() and path.stat().st_size == size):
                download(
                    f"{endpoint}/{repo}/resolve/{revision}/{name}",
                    path,
                    sha256,
                    size=size,
                    headers=headers(),
                )
            if name == "config.json":
                check_config(folder)
                check_space(folder, {other: size for other, (size, _) in files.items()})
    except HTTPFailure as error:
        raise UserError(explain(repo, endpoint, error)) from error
    except OSError as error:
        raise UserError(
            f"cannot write {error.filename or folder}: {error.strerror}; set HF_HOME to another"
        ) from error
    sizes = {name: (folder / name).stat().st_size for name in files}
    write_whole(folder / complete, lambda file: file.write(json.dumps(sizes, indent=1).encode()))
    return folder


def is_complete(folder: Path, complete: str) -> bool:
    try:
        sizes = parse_json((folder / complete).read_bytes(), {str: SIZE})
        return all(
            (folder / Path(name).name).stat().st_size == size for name, size in sizes.items()
        )
    except (OSError, ValueError):
        return False


def list_files(
    repo: str, endpoint: str, folder: Path, weights: bool
) -> tuple[dict[str, tuple[int | None, str | None]], str]:
    """({file: (size, SHA-256)} of what is needed, the revision): of safetensors and pickles, the first that it has.

    weights: whether they are needed, too.
    """
    listing = folder / "listing.json"
    for old in (listing, listing.with_name("listing.json.part")):
        old.unlink(missing_ok=True)
    download(f"{endpoint}/api/models/{repo}?blobs=true", listing, headers=headers())
    try:
        content = parse_json(listing.read_bytes(), LISTING)
    except ValueError as error:
        raise UserError(
            f"{endpoint} does not answer as the hub of Hugging Face does: {error}; see HF_ENDPOINT"
        ) from error
    listing.unlink()
    found = {file["rfilename"]: file for file in content["siblings"]}
    wanted = [name for name in found if name in TEXT_FILES]
    if weights:
        names = next(
            (
                names
                for kind in WEIGHTS
                if (names := [name for name in found if re.fullmatch(kind, name)])
            ),
            [],
        )
        if "config.json" not in found or not names:
            raise UserError(
                f"{repo} has no config.json with model.safetensors or pytorch_model.bin; name another model"
            )
        single = next(
            (name for name in names if name in ("model.safetensors", "pytorch_model.bin")), None
        )
        wanted += [single] if single else names
    elif not wanted:
        raise UserError(f"{repo} has no tokenizer; name another model")
    return {name: size_and_hash(found[name]) for name in wanted}, content.get("sha", "main")


def size_and_hash(file: dict) -> tuple[int | None, str | None]:
    large = file.get("lfs") or {}  # large files come with their SHA-256
    return file.get("size", large.get("size")), large.get("sha256")


def headers() -> dict[str, str]:
    token = os.environ.get("HF_TOKEN", "").strip()
    return {"Authorization": f"Bearer {token}"} if token else {}


def check_space(folder: Path, sizes: dict[str, int | None]) -> None:
    """Raise UserError where the disk has no room for what is still to come."""
    present = {path.name.removesuffix(".part"): path.stat().st_size for path in folder.iterdir()}
    needed = sum((size or 0) - min(size or 0, present.get(name, 0)) for name, size in sizes.items())
    if (free := shutil.disk_usage(folder).free) < needed:
        room = f"{needed / 1e9:.1f} GB are needed, and {free / 1e9:.1f} GB are free"
        raise UserError(f"no room in {folder}: {room}; set HF_HOME to a folder on another disk")


def explain(repo: str, endpoint: str, error: HTTPFailure) -> str:
    if error.code == 404:
        return f"there is no model {repo} at {endpoint}; check the name, or set HF_TOKEN if it is private"
    if error.code in (401, 403):
        page = f"{endpoint}/{repo}"
        return f"{page} asks for permission (HTTP {error.code}); accept its terms there, and set HF_TOKEN to your token"
    offline = (
        "get the folder elsewhere and write --init_from=FOLDER, or set HF_ENDPOINT to a mirror"
    )
    return f"{error}; run it again to resume, or without a network {offline}"
