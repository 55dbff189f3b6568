"""One training shared by several processes, which torchrun starts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tinychat.runtime.errors import ConfigError


def join_processes() -> tuple[int, int]:
    """Under torchrun, meet the other processes; returns (rank, number of processes)."""
    from tinychat.runtime.device import environment_number

    if environment_number("WORLD_SIZE", 1) < 2:
        return 0, 1
    import torch
    import torch.distributed as dist

    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    return dist.get_rank(), dist.get_world_size()


@contextmanager
def first_alone(rank: int, world: int) -> Iterator[None]:
    """Under torchrun the first process does the work alone; the others then find it done."""
    if world < 2:
        yield
        return
    import torch.distributed as dist

    if rank:
        dist.barrier()
    yield
    if not rank:
        dist.barrier()


def check_shared_alike(
    folder: Path, record: Mapping[str, Any], world: int, rows: int, setting: str = "batch"
) -> None:
    """Refuse another number of processes with another number of rows a step than a run began with.

    A step counts its rows, so the run would leave out texts, or read some twice. `setting` says how
    many rows each process takes.
    """
    begun_by, begun_with = record.get("processes", 1), record.get("rows", rows)
    if world != begun_by and rows != begun_with:
        raise ConfigError(
            f"{folder} was begun by {begun_by} processes with {begun_with} rows a step in all, and "
            f"these are {world} with {rows}; "
            f"add --set {setting}={max(1, begun_with // world)}."
        )
