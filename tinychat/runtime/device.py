"""The machine: which device to use, how many cores, what to write into a checkpoint's lineage."""

import ctypes
import functools
import math
import os
import platform
import shlex
import shutil
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinychat.runtime.errors import ConfigError

if TYPE_CHECKING:
    import torch

# The instruction sets that decide how fast bf16 and int8 arithmetic is on a CPU.
_TELLING_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_int8", "asimd", "bf16", "sve")


def pick_device(name: str = "auto") -> "torch.device":
    """The device to compute on: `auto` takes an NVIDIA GPU, else Apple's, else the CPU.

    Under torchrun (`LOCAL_RANK` set) each process takes its own GPU. Raises ConfigError for a
    device that this machine or this build of torch does not have.
    """
    import torch

    has_mps = torch.backends.mps.is_available()
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if has_mps else "cpu"
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda", "mps") or (index and not index.isdecimal()):
        raise ConfigError(f"Unknown device {name!r}: choose auto, cpu, cuda, cuda:1 or mps.")
    if kind == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if not count:
            raise ConfigError(
                f"Device {name!r} needs an NVIDIA GPU and a CUDA build of torch, and this "
                "machine offers none: choose cpu."
            )
        number = int(index) if index else environment_number("LOCAL_RANK", 0)
        if number >= count:
            raise ConfigError(
                f"Device 'cuda:{number}' does not exist, this machine has {count} GPU(s): "
                f"choose cuda:0{f' to cuda:{count - 1}' if count > 1 else ''}."
            )
        return torch.device("cuda", number)
    if kind == "mps" and not has_mps:
        raise ConfigError(f"Device {name!r} needs an Apple GPU, which is not here: choose cpu.")
    return torch.device(kind)


def available_cores() -> int:
    """Cores that this process may use: its affinity, and a container's quota where one is set."""
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        if quota != "max":
            cores = min(cores, math.ceil(int(quota) / int(period)))
    except (OSError, ValueError, ZeroDivisionError):
        pass  # no cgroup (version 2) here: the affinity stands
    return max(cores, 1)


def set_threads(threads: int | None = None) -> int:
    """Set torch's thread count, and return it.

    Without a number: `OMP_NUM_THREADS` where the user set it, else the available cores (torch's
    own default ignores a container's quota, and more threads than cores are slower).
    """
    import torch

    if threads is None:
        wish = os.environ.get("OMP_NUM_THREADS", "")
        threads = int(wish) if wish.isdecimal() and int(wish) else available_cores()
    if threads < 1:
        raise ConfigError(f"threads = {threads} cannot compute anything: give 1 or more.")
    torch.set_num_threads(threads)
    return threads


def reuse_memory() -> bool:
    """Keep freed memory in the process, in large pages; call it before the first tensor is made.

    A training step frees and takes the same gigabyte again and again. By default the C library
    gives large blocks back to Linux each time, and a tenth of the time goes into fetching fresh
    pages (lab notes). Returns False, and changes little, where the C library isn't glibc.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch then asks Linux for large pages
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return False
    trim_threshold, top_pad, mmap_max = -1, -2, -4  # their numbers in glibc's malloc.h
    settings = ((mmap_max, 0), (trim_threshold, 2**31 - 1), (top_pad, 2**28))
    return all([mallopt(name, value) == 1 for name, value in settings])


def environment_number(name: str, default: int) -> int:
    """What torchrun says in an environment variable. Raises ConfigError for no whole number."""
    value = os.environ.get(name, str(default))
    if not value.isdecimal():
        raise ConfigError(f"{name} is {value!r}, and no whole number: unset it.")
    return int(value)


@functools.cache
def has_compiler() -> bool:
    """Whether torch.compile can build its kernels: a C++ compiler and Python's headers."""
    try:
        wish = shlex.split(os.environ.get("CXX", "")) if os.name != "nt" else []
    except ValueError:  # an open quote
        return False
    names = wish[:1] or (["cl"] if os.name == "nt" else ["g++", "clang++", "c++"])
    headers = Path(sysconfig.get_paths()["include"]) / "Python.h"
    return any(shutil.which(name) for name in names) and headers.is_file()


@functools.cache
def has_fast_bf16() -> bool:
    """Whether bfloat16 products are faster here than float32 ones; elsewhere they're emulated."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if torch.backends.mps.is_available():
        return False
    return not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(_cpu()[1])


def describe_hardware() -> dict[str, Any]:
    """This machine in JSON types: cpu, flags, cores, memory_gb, gpus, system, python, torch."""
    import torch

    gpus = []
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            gpu = torch.cuda.get_device_properties(number)
            gpus.append({"name": gpu.name, "memory_gb": round(gpu.total_memory / 1e9, 1)})
    name, flags = _cpu()
    return {
        "cpu": name,
        "flags": flags,
        "cores": available_cores(),
        "memory_gb": _memory_gb(),
        "gpus": gpus,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": str(torch.__version__),
    }


def _cpu() -> tuple[str, list[str]]:
    fields: dict[str, str] = {}
    try:
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            key, _, value = line.partition(":")
            fields.setdefault(key.strip(), value.strip())
    except OSError:
        pass  # not Linux
    name = fields.get("model name") or platform.processor() or platform.machine() or "unknown"
    present = set((fields.get("flags") or fields.get("Features") or "").split())
    return name, [flag for flag in _TELLING_FLAGS if flag in present]


def _memory_gb() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1)
    except (AttributeError, ValueError, OSError):
        return None  # Windows does not say
