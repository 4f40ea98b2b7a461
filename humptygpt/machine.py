"""Find how many cores and how much memory this process may use, report errors in one line, and hide what differs
between operating systems.

CPU affinity and cgroups may limit it to part of the machine. A script calls start() before it imports numpy and torch,
because these read their thread count and wait policy only once, on import.
"""

import glob
import hashlib
import math
import os
import re
import signal
import sys
import time
import typing
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from humptygpt.cli import UserError, one_line

# packages that training and sampling a GPT do not need, but that some other features do
OPTIONAL = {"gguf", "huggingface_hub", "matplotlib", "pyarrow", "sacrebleu", "safetensors"}
OPTIONAL |= {"sentencepiece", "starlette", "tiktoken", "tokenizers", "uvicorn", "wandb"}
ON_WINDOWS = sys.platform == "win32"
GIVEN = {*os.environ}  # names of the variables that the user has set
STARTED = time.perf_counter()  # when the command started, not counting Python's own startup
# Linux's control groups (cgroups), version 2, which containers, Slurm and systemd use
CGROUPS = Path("/sys/fs/cgroup")
OUR_GROUPS = Path("/proc/self/cgroup")
MEMINFO = Path("/proc/meminfo")
# signals that ask a run to stop: Ctrl-C, kill, Ctrl-Break on Windows, and a closed terminal elsewhere
STOPPING = {getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGBREAK", "SIGHUP") if hasattr(signal, name)}
PATIENCE = 2  # seconds that other ranks wait for rank 0 to report an error first
SPINS = 5000  # how often a waiting thread looks again before it sleeps: some 90 us, two or three wake-ups


def start() -> None:
    """Prepare for a script's imports: open closed streams, limit the threads to the usable cores, and their spinning.

    A thread that spins while it waits for another thread of its process blocks a core that a different process could
    use: with spinning threads, two training runs on two cores were ten times slower. A thread that sleeps has to be
    woken, which a virtual machine makes slow. Settings in the user's environment take precedence.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        # a closed stream is opened anew, or another file would get its number
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: PTH123, SIM115, stays open
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        # Ctrl-C during the imports ends the script without a traceback
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"} & os.environ.keys():
        # the first is for GCC's OpenMP, which torch uses on Linux, the second, in milliseconds, for LLVM's and Intel's
        os.environ["GOMP_SPINCOUNT"] = str(SPINS)
        os.environ["KMP_BLOCKTIME"] = "1"
    if usable_cores() < affinity():
        os.environ.setdefault("OMP_NUM_THREADS", str(usable_cores()))


# --------------------------------------------------------------------------------------
# Cores


def affinity() -> int:
    """Number of cores that the system lets this process run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def usable_cores() -> int:
    """Number of threads that can run at once, limited by CPU affinity and by cgroup quotas, which are rounded up."""
    cores = affinity()
    for folder in cgroup_folders():
        if quota := read_numbers(folder / "cpu.max"):
            cores = min(cores, math.ceil(quota[0] / quota[1]))
    return max(1, cores)


# --------------------------------------------------------------------------------------
# Memory


def available_memory() -> int:
    """Bytes that this process can still allocate, limited by the machine and by the cgroups.

    Without Linux's /proc/meminfo, this is the machine's total memory or, if that is also unknown, as on Windows, the
    largest integer.
    """
    free = sys.maxsize
    if available := re.search(r"^MemAvailable: *(\d+) kB$", read(MEMINFO), re.MULTILINE):
        free = 1024 * int(available[1])
    elif "SC_PHYS_PAGES" in getattr(os, "sysconf_names", ()):
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for folder in cgroup_folders():
        limit = read_numbers(folder / "memory.max")
        used = read_numbers(folder / "memory.current")
        if limit and used:
            free = min(free, limit[0] - used[0] + file_cache(folder))
    return max(0, free)


def gigabytes(size: float) -> str:
    """Format a number of bytes, for example as "3.21 GB"."""
    if size < 1e9:
        return f"{size / 1e6:,.1f} MB"
    return f"{size / 1e9:,.2f} GB"


def check_fits(what: str, size: float, free: float, advice: str) -> None:
    """Raise UserError if size is larger than the free bytes. what: subject and verb, as in "weights take"."""
    if size > free:
        raise UserError(f"{what} {gigabytes(size)} of memory, but only {gigabytes(free)} is free; {advice}")


# messages of failed allocations, most of which have no exception class of their own
NO_MEMORY = re.compile(
    "can't allocate memory|not enough memory|out of memory|std::bad_alloc|unable to mmap|failed to map segment"
    "|cannot allocate memory|could not create a (primitive|memory)|can't start new thread",
    re.IGNORECASE,
)


def is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, RuntimeError | OSError | ImportError):
        return bool(NO_MEMORY.search(str(error)))
    return isinstance(error, MemoryError)


@contextmanager
def memory_advice(advice: str) -> Iterator[None]:
    """If an allocation in the block fails, raise UserError with this advice."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        where = " on the GPU" if "CUDA" in str(error) else ""
        raise UserError(f"out of memory{where}; {advice}") from error


# --------------------------------------------------------------------------------------
# Control groups


def cgroup_folders() -> list[Path]:
    """Folders of this process's cgroup and its ancestors, whose limits also apply."""
    group = re.search("^0::/(.*)$", read(OUR_GROUPS), re.MULTILINE)
    # in a container, this may be the path outside the container; inside, only the root folder exists
    path = CGROUPS / group[1] if group else CGROUPS
    return [path, *path.parents]


def read(path: Path) -> str:
    """Read a system file. Returns "" if it cannot be read."""
    try:
        return path.read_text()
    except OSError:
        return ""


def read_numbers(path: Path) -> list[int]:
    """Read the numbers in a cgroup's file. Returns [] if there is no such file or it says "max", for no limit."""
    words = read(path).split()
    return [] if "max" in words else list(map(int, words))


def file_cache(group: Path) -> int:
    """Bytes in the group's file cache, which the system frees when memory is needed."""
    stat = read(group / "memory.stat")
    return sum(map(int, re.findall(r"^(?:in)?active_file (\d+)$", stat, re.MULTILINE)))


# --------------------------------------------------------------------------------------
# Arguments and streams


def expand(patterns: Sequence[str]) -> list[str]:
    """Replace patterns such as out/* by the paths that they match, which the shells of Windows leave to programs."""
    return [path for each in patterns for path in sorted(glob.glob(each)) or [each]]  # noqa: PTH207


def use_utf8() -> None:
    """Read and write UTF-8 whatever the locale is, which may lack most characters. A byte order mark is skipped.

    Bytes that are not UTF-8 become lone surrogates, as on the command line, and check_text() refuses those.
    """
    for stream in (sys.stdout, sys.stderr):
        if stream:  # None without a console
            stream.reconfigure(encoding="utf-8", errors=stream.errors)
    if sys.stdin:
        sys.stdin.reconfigure(encoding="utf-8-sig", errors="surrogateescape")


def discard_output() -> None:
    sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123, SIM115, stays open


# --------------------------------------------------------------------------------------
# Processes that torchrun has started, and numbers that are the same on every machine


def launched() -> tuple[int, int]:
    """Return this process's rank and the number of processes that torchrun has started."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def random_key(*numbers: int) -> int:
    """Hash the numbers to 63 pseudorandom bits, the same on every machine."""
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


# --------------------------------------------------------------------------------------
# Running a script


def run(main: Callable[[list[str]], int | None]) -> None:
    """Call main(argv) and exit with its code.

    A UserError or a failed allocation becomes one line on stderr and exit code 2.
    """
    if main.__module__ == "__main__":  # main() is in the script that was started
        start()
        use_utf8()
        if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:
            signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as error:
        complain(str(error))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except BrokenPipeError:
        # the program that reads our output has ended: python sample.py ... | head
        sys.stdout = None  # otherwise Python would fail again when it flushes at exit
        sys.exit(128 + 13)  # 13: SIGPIPE
    except ModuleNotFoundError as error:
        # tiktoken_ext comes with tiktoken
        package = (error.name or "").partition(".")[0].removesuffix("_ext")
        if package not in OPTIONAL:
            raise
        complain(f"this needs the package {package}: pip install {package}")
    except Exception as error:
        if is_out_of_memory(error):
            complain("out of memory")
        raise


def complain(message: str) -> typing.NoReturn:
    """Print one line and exit with code 2. Rank 0 does so first, and torchrun then stops the other ranks."""
    if launched()[0]:
        time.sleep(PATIENCE)
    script = os.path.basename(sys.argv[0])  # noqa: PTH119, since a Path takes memory, of which there may be none
    print(f"{script}: {one_line(message)}", file=sys.stderr)
    sys.exit(2)
