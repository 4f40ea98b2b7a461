"""What a process may use: cores and memory by affinity, control group and ulimit, and not what the machine has.

A script calls start() before numpy and torch are loaded: their threads read once, at that moment, how many they are and
how they wait for each other.
"""

import math
import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CGROUPS, OUR_GROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
# Bytes that a process takes to load torch, and numpy: of memory that it shares with nobody, and of virtual memory. With
# fewer it would be killed by its container, or aborted by the library.
TORCH, NUMPY = (150_000_000, 600_000_000), (12_000_000, 90_000_000)
STACK = 8 << 20  # bytes that a thread reserves, and hardly uses
SPINS = 1300  # of a thread that waits for another, less than a tenth of a millisecond; libgomp's default is 300,000
NOTED = 0.5  # cores that others take from us before there is a note


def start(imports: tuple[int, int] = (0, 0)) -> None:
    """For a script, before numpy and torch are loaded: as many threads as it may use, which give way to others.

    imports: what these will take, such as TORCH; where there is less, that is one line.
    A thread that spins while it waits for one of its own process keeps a core from the process whose turn it is: two
    trainings on two cores were slowed down tenfold. What the user has set in the environment stays.
    """
    global load
    sys.excepthook = report_imports
    load = load or Load()
    for kind, needed, free in zip(
        ("memory", "virtual memory"), imports, (available_memory(), addresses()), strict=True
    ):
        if needed > free:
            raise OutOfMemory(
                f"{gigabytes(needed)} of {kind} are needed to start, and {gigabytes(free)} are free"
            )
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = str(SPINS)  # GCC's OpenMP, which torch has on Linux
        os.environ["KMP_BLOCKTIME"] = "1"  # milliseconds; Intel's and LLVM's, elsewhere
    if usable_cores() < len(affinity()):
        os.environ.setdefault("OMP_NUM_THREADS", str(usable_cores()))


# --------------------------------------------------------------------------------------
# Cores


def affinity() -> set[int]:
    """The cores that the system lets this process run on."""
    return (
        os.sched_getaffinity(0)
        if hasattr(os, "sched_getaffinity")
        else set(range(os.cpu_count() or 1))
    )


def usable_cores() -> int:
    """How many threads can run at once: by affinity, and by the quota of the control group, rounded up."""
    return max(1, min([len(affinity()), *map(math.ceil, cpu_quotas())]))


def cpu_quotas() -> Iterator[float]:
    """In cores."""
    for folder in cgroup_folders("cpu"):
        quota, period = read_numbers(folder / "cpu.max", 2)
        if period is None:
            quota, period = (
                read_numbers(folder / f"cpu.cfs_{name}_us", 1)[0] for name in ("quota", "period")
            )
        if quota is not None and period and quota > 0:
            yield quota / period


class Load:
    """What others compute on our cores from the constructor to others()."""

    def __init__(self):
        self.before = self.read()

    def read(self) -> tuple[float, float, float]:
        """Seconds: of the clock; in which our cores were busy; of those, with this process and its children."""
        import psutil  # here, since prepare_data.py --help needs no more than the rest

        cores = [
            times for core, times in enumerate(psutil.cpu_times(percpu=True)) if core in affinity()
        ]
        idle = ("idle", "iowait", "guest", "guest_nice")  # guests are counted in user, too
        busy = sum(
            value for times in cores for name, value in times._asdict().items() if name not in idle
        )
        return time.monotonic(), busy, sum(os.times()[:4])

    def others(self) -> float:
        """How many of our cores others have kept busy."""
        seconds, busy, ours = (
            after - before for after, before in zip(self.read(), self.before, strict=True)
        )
        return max(0.0, (busy - ours) / seconds) if seconds > 0 else 0.0


load: Load | None = None  # since start()


def load_note() -> str | None:
    """What to report where others have left less than our threads could use, since start()."""
    cores, others = len(affinity()), load.others() if load else 0.0
    chosen = os.environ.get(
        "OMP_NUM_THREADS", ""
    )  # also by torchrun, whose processes share the cores
    threads = int(chosen) if chosen.isdecimal() else usable_cores()
    if others + threads < cores + NOTED:
        return None
    return f"other processes use {others:.1f} of the {cores} cores; alone, this would be faster"


# --------------------------------------------------------------------------------------
# Memory


def available_memory() -> int:
    """Bytes that this process can still allocate: of the machine, of its control groups, and by ulimit -v and -d."""
    import psutil

    found = [psutil.virtual_memory().available, group_memory(), addresses()]
    if sys.platform != "win32":
        import resource

        used, limit = psutil.Process().memory_info(), resource.getrlimit(resource.RLIMIT_DATA)[0]
        if limit != resource.RLIM_INFINITY:
            found.append(limit - getattr(used, "data", used.rss))
    return int(max(0, min(found)))


def group_memory() -> float:
    """Bytes that the control groups of this process still allow."""
    found = [math.inf]
    for folder in cgroup_folders("memory"):
        limit, used, total = (
            read_numbers(folder / "memory.max", 1)[0],
            folder / "memory.current",
            "",
        )
        if limit is None:
            limit, used = (
                read_numbers(folder / "memory.limit_in_bytes", 1)[0],
                folder / "memory.usage_in_bytes",
            )
            total = "total_"
        used = read_numbers(used, 1)[0]
        if limit is not None and used is not None:
            # a cache of files gives way
            cache = sum(
                read_entry(folder / "memory.stat", f"{total}{kind}_file")
                for kind in ("inactive", "active")
            )
            found.append(limit - used + cache)
    return min(found)


def addresses() -> float:
    """Bytes that ulimit -v still allows."""
    if sys.platform == "win32":
        return math.inf
    import resource

    import psutil

    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    return (
        math.inf if limit == resource.RLIM_INFINITY else limit - psutil.Process().memory_info().vms
    )


def limit_memory(mapped: int = 0) -> None:
    """Where a control group, such as a container's, has less than the machine, let allocations beyond it fail.

    That is one line that names the way out; the group would kill the process instead, without a word. mapped: bytes of
    a file whose pages the system may drop.
    """
    import psutil

    available = group_memory()
    if sys.platform != "linux" or available >= psutil.virtual_memory().available:
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    if soft == resource.RLIM_INFINITY:
        used = psutil.Process().memory_info()
        # what is reserved counts, used or not, but for the stacks of threads
        limit = used.rss - used.shared + available + usable_cores() * STACK + mapped
        resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))


def gigabytes(size: float) -> str:
    """Such as 3.21 GB."""
    return (
        f"{size / 1e9:,.{1 if size >= 1e10 else 2}f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"
    )


class OutOfMemory(MemoryError):
    """An allocation failed; the message has the way out."""


# How those who allocate say that they could not: few have a class for it
NO_MEMORY = "can't allocate memory|not enough memory|out of memory|std::bad_alloc|unable to mmap|failed to map segment"
NO_MEMORY += "|Cannot allocate memory|could not create a (primitive|memory)|can't start new thread"
REQUESTED = r"(?:tried to allocate|Unable to allocate) ([\d.]+) (bytes|[KMGTPE]iB)"
UNITS = {"bytes": 1} | {
    f"{letter}iB": 2 ** (10 * power) for power, letter in enumerate("KMGTPE", start=1)
}


def is_out_of_memory(error: BaseException) -> bool:
    kinds = (RuntimeError, OSError, ImportError)
    described = isinstance(error, kinds) and re.search(NO_MEMORY, str(error), re.IGNORECASE)
    return isinstance(error, MemoryError) or bool(described)


def describe_failure(error: BaseException) -> str:
    """One line for an allocation that failed."""
    if isinstance(error, OutOfMemory):
        return str(error)
    match = re.search(REQUESTED, str(error), re.IGNORECASE)
    requested = (
        f": {gigabytes(float(match[1]) * UNITS[match[2]])} more were requested" if match else ""
    )
    if "CUDA" in str(error):
        return f"out of memory on the GPU{requested}"
    return f"out of memory{requested}, {gigabytes(available_memory())} are available"


@contextmanager
def memory_advice(way_out: str) -> Iterator[None]:
    """Raises OutOfMemory, with the way out, where an allocation fails."""
    try:
        yield
    except (MemoryError, RuntimeError, OSError) as error:
        if isinstance(error, OutOfMemory) or not is_out_of_memory(error):
            raise
        raise OutOfMemory(f"{describe_failure(error)}; {way_out}") from error


def report_imports(kind: type, error: BaseException, trace: object) -> None:
    """sys.excepthook of a script: one line where what it imports is missing, or memory does not suffice to load it."""
    if (
        isinstance(error, ModuleNotFoundError)
        and error.name
        and not error.name.startswith("humptygpt")
    ):
        line = f"the package {error.name} is not installed here; pip install -r requirements.txt"
    elif is_out_of_memory(error):
        reason = (
            error if isinstance(error, OutOfMemory) else "out of memory"
        )  # to look for more would take some, too
        line = f"{reason}; end other programs, or raise the limit (of a container, or ulimit -v)"
    else:
        sys.__excepthook__(kind, error, trace)
        return
    print(f"{Path(sys.argv[0]).name}: {line}", file=sys.stderr, flush=True)
    os._exit(2)  # an excepthook has no other way to choose the code


# --------------------------------------------------------------------------------------
# Control groups of Linux, in which containers run


def cgroup_folders(controller: str) -> Iterator[Path]:
    """Of the groups that limit this process, each inside the next; of version 2, and of version 1."""
    try:
        lines = OUR_GROUPS.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        root = CGROUPS / controller if controllers else CGROUPS
        group = root / path.strip(
            "/"
        )  # in a container it may be the path outside, and only the root is there
        yield from (
            folder
            for folder in (group, *group.parents)
            if folder.is_relative_to(root) and folder.is_dir()
        )


def read_numbers(path: Path, count: int) -> list[int | None]:
    """The first numbers in a file; None for "max", or where there is no such file."""
    try:
        words = path.read_text().split()
    except OSError:
        words = []
    return [
        int(word) if re.fullmatch(r"-?\d+", word) else None
        for word in [*words, *count * [""]][:count]
    ]


def read_entry(path: Path, name: str) -> int:
    """The number after this name in a file of lines; 0 where there is none."""
    try:
        lines = dict(line.split(maxsplit=1) for line in path.read_text().splitlines())
    except (OSError, ValueError):
        return 0
    return int(lines.get(name, 0))
