"""Read weights in Hugging Face's formats: safetensors or torch.save's pickles, in one file or in several shards.

Tensors in safetensors files stay memory-mapped until they are used, so their names and shapes can be checked first.
Reading a file never runs code from it.
"""

from pathlib import Path

from torch import Tensor, strided

from humptygpt.checkpoint import load_plain, refuse_damaged
from humptygpt.files import parse_json

MODEL_FILES = ("model.safetensors", "pytorch_model.bin")  # the first that exists is read
Weights = dict[str, Tensor]  # tensors by name


def open_weights(folder: Path, names: tuple[str, ...] = MODEL_FILES) -> Weights:
    """Read all tensors from the first of these files that the folder has. Raises ValueError, UserError or OSError."""
    for name in names:
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            return open_file(folder / name)
        if index.is_file():
            content = parse_json(index.read_bytes(), {"weight_map": {str: str}})
            tensors = {}
            for shard in sorted(set(content["weight_map"].values())):
                tensors |= open_file(folder / Path(shard).name)  # never from another folder
            return tensors
    raise ValueError(f"there is neither {' nor '.join(names)}")


def open_file(path: Path) -> Weights:
    from safetensors.torch import load_file

    path.open("rb").close()  # raises OSError if the file cannot be read
    problem = "is truncated or damaged, or holds more than tensors and plain data"
    with refuse_damaged(path, problem):
        # load_file also checks that the file has the size that its header declares
        safe = path.suffix == ".safetensors"
        tensors = load_file(path) if safe else load_plain(path)
        check_dense(tensors)
        return tensors


def check_dense(tensors: Weights) -> None:
    """Raise ValueError unless `tensors` maps names to dense CPU tensors, or any error if it is not a dictionary."""
    for name, x in tensors.items():
        dense = isinstance(x, Tensor) and x.layout == strided and x.device.type == "cpu"
        # a tensor with a stride of 0 can claim to be of any size, although little memory is behind it
        small = dense and not x.is_nested and x.nbytes <= x.untyped_storage().nbytes()
        if type(name) is not str or not small or x.is_quantized:
            raise ValueError(f"{name} must be a dense tensor")


def check_shapes(tensors: Weights, expected: dict[str, tuple[int, ...]]) -> None:
    """Raise ValueError unless the tensors have exactly the expected names and shapes."""
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if different := found.items() ^ expected.items():
        name, _ = min(different)
        raise ValueError(
            f"the weight {name}: expected shape {expected.get(name, 'none')}, found {found.get(name, 'none')}"
        )
