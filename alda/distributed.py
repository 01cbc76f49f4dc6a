"""torch.distributed for a run under torchrun. Who else is training?

    torchrun --nproc_per_node 4 -m alda.loop --strategy stal ...
    rank, world = rank_and_world()                  # (0, 1) without torchrun

Without torchrun no process is waited for. All but `world_size`, `check_environment`,
`rank_and_world`, `is_first`, `share` and `say` are collective: every process has to call them, in
the same order.

What the processes share: --batch is the whole step's, each process gets batch / processes of its
samples, and a loss is the mean over the pixels of all of them (`mean_count`). A pass over images is
split by `share`, its results come together on the first process, which alone writes.
"""

import os
import secrets
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from alda import InputError

JOINING = 120  # seconds to wait for the other processes
WAITING = 7200  # for what the first does alone: it stores a round of a large dataset


def world_size() -> int:
    """How many processes torchrun says there are, 1 without it. Raises InputError for a WORLD_SIZE
    that was set by hand and is no such number."""
    text = os.environ.get("WORLD_SIZE", "1")
    if not text.isdigit() or int(text) < 1:
        raise InputError(
            f"the environment says WORLD_SIZE={text!r}, expected a number of processes; unset it, or "
            "start with torchrun"
        )
    return int(text)


def check_environment() -> None:
    """Raises InputError where what torchrun sets is incomplete or contradicts itself."""
    numbers = {}
    for name in ("RANK", "LOCAL_RANK", "MASTER_PORT"):
        text = os.environ.get(name, "")
        numbers[name] = int(text) if text.isdigit() else -1
    address = os.environ.get("MASTER_ADDR", "")
    inside = numbers["RANK"] < world_size() and numbers["MASTER_PORT"] < 2**16
    if min(numbers.values()) < 0 or not address or not inside:
        raise InputError(
            f"WORLD_SIZE={world_size()} is set but RANK, LOCAL_RANK, MASTER_ADDR and MASTER_PORT do "
            "not go with it; unset it to run in one process, or start with torchrun"
        )


def join(device: torch.device) -> torch.device:
    """Joins the processes that torchrun started, if it did; returns this process's device. Raises
    InputError where torchrun's variables are wrong or the other processes do not come."""
    alone = world_size() == 1
    if not alone:
        check_environment()
    if device.type == "cuda":
        if not alone:
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        if device.index is not None and device.index >= torch.cuda.device_count():
            raise InputError(
                "torchrun started more processes here than there are GPUs "
                f"({torch.cuda.device_count()})"
            )
        torch.cuda.set_device(device)  # events and streams without a device are this one's
    if alone:
        return device
    backend = "nccl" if device.type == "cuda" else "gloo"
    try:
        wait = timedelta(seconds=JOINING)
        store, rank, world = next(dist.rendezvous("env://", timeout=wait))
        kind = {"store": fresh(store, rank, world), "rank": rank, "world_size": world}
        dist.init_process_group(backend, timeout=timedelta(seconds=WAITING), **kind)
    except (RuntimeError, ValueError, OSError) as error:
        raise InputError(
            f"the {world_size()} processes of WORLD_SIZE did not meet within {JOINING} s "
            f"({' '.join(str(error).split())[:120]}); start all of them with torchrun, or unset it"
        ) from None
    return device


def fresh(store: dist.Store, rank: int, world: int) -> dist.Store:
    """The part of `store` that belongs to this start alone. torchrun keeps one store for all restarts:
    a process that finds the addresses of the last start waits for one that is gone.

    Every process says hello under a name of its own, which no earlier one had; the first welcomes
    each until all are ready. Collective. Raises RuntimeError where one does not come within JOINING s.
    """
    own, end = secrets.token_hex(8), time.monotonic() + JOINING
    if rank:
        store.set(f"hello/{rank}", own)
        first = store.get(f"welcome/{own}").decode()
        store.set(f"ready/{first}/{rank}", "")
        return dist.PrefixStore(first, store)
    others = range(1, world)
    while not all(store.check([f"ready/{own}/{other}"]) for other in others):
        for other in others:
            if store.check([f"hello/{other}"]):
                store.set(f"welcome/{store.get(f'hello/{other}').decode()}", own)
        if time.monotonic() > end:
            raise RuntimeError("not all said hello")
        time.sleep(0.02)
    return dist.PrefixStore(own, store)


def leave() -> None:
    """The end of a run."""
    if rank_and_world()[1] > 1:
        dist.destroy_process_group()


def rank_and_world() -> tuple[int, int]:
    """(rank, number of processes); (0, 1) without torchrun."""
    together = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if together else (0, 1)


def is_first() -> bool:
    """Whether this is the process that writes and prints."""
    return rank_and_world()[0] == 0


def say(text: str) -> None:
    """Prints a line, once for all processes."""
    if is_first():
        print(text, flush=True)


def share(indices) -> list:
    """This process's part of a list: every `world`-th from its own rank on."""
    rank, world = rank_and_world()
    return list(indices)[rank::world]


def first_says(answer: bool) -> bool:
    """The first process's answer to a question of all: whether a file is there, say, which the others
    may see later on a shared file system."""
    return all_reduce_number(int(answer and is_first())) > 0


def barrier(file: Path | None = None) -> None:
    """Waits until every process is here and sees `file`, which the first has written: on a shared file
    system the others may see it late."""
    if rank_and_world()[1] == 1:
        return
    # NCCL guesses a GPU from the rank, which another machine's process may have
    nccl = dist.get_backend() == "nccl"
    dist.barrier(device_ids=[torch.cuda.current_device()] if nccl else None)
    end = time.monotonic() + JOINING
    while file and not file.is_file() and time.monotonic() < end:
        time.sleep(0.1)


def all_reduce(values: torch.Tensor) -> torch.Tensor:
    """The sum of the processes' `values`, in place."""
    if rank_and_world()[1] > 1:
        dist.all_reduce(values)
    return values


def all_reduce_number(number: int) -> int:
    """The sum of an integer over the processes."""
    if rank_and_world()[1] == 1:
        return number
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    return int(all_reduce(torch.tensor(number, dtype=torch.int64, device=device)))


def mean_count(chosen: torch.Tensor) -> torch.Tensor:
    """How many of `chosen` (bool) are True, at least 1: 0-dim. Under torchrun the mean over the
    processes.

    A sum over this process's pixels divided by it, with gradients averaged over the processes, has
    the gradient of the mean over all pixels of all processes. Waits for no device.
    """
    world = rank_and_world()[1]
    count = chosen.sum()
    return count.clamp(min=1) if world == 1 else all_reduce(count).clamp(min=1) / world


def mean_over_processes(values: torch.Tensor) -> torch.Tensor:
    """The processes' mean of `values`, a new tensor; `values` itself in one process."""
    world = rank_and_world()[1]
    return values if world == 1 else all_reduce(values.clone()) / world


def all_gather(values: torch.Tensor) -> list[torch.Tensor]:
    """The same-shaped tensors of all processes in the order of ranks; [values] in one process."""
    world = rank_and_world()[1]
    if world == 1:
        return [values]
    parts = [torch.empty_like(values) for _ in range(world)]
    dist.all_gather(parts, values.contiguous())
    return parts


def all_gather_list(items: list) -> list:
    """The items of all processes in one list, in the order of ranks."""
    world = rank_and_world()[1]
    if world == 1:
        return items
    parts = [None] * world
    dist.all_gather_object(parts, items)
    return [item for part in parts for item in part]


def gather_list(items: list) -> list:
    """On the first process the items of all, in the order of ranks; nothing on the others."""
    rank, world = rank_and_world()
    if world == 1:
        return items
    parts = [None] * world if rank == 0 else None
    dist.gather_object(items, parts)
    return [item for part in parts for item in part] if rank == 0 else []


def broadcast_buffers(model: torch.nn.Module) -> None:
    """Gives every process the buffers of rank 0.

    Without SyncBatchNorm (on CPUs) the running statistics of the processes differ.
    """
    if rank_and_world()[1] == 1:
        return
    buffers = [*model.buffers()]
    for dtype in dict.fromkeys(buffer.dtype for buffer in buffers):  # one message each
        alike = [buffer for buffer in buffers if buffer.dtype == dtype]
        flat = torch.cat([buffer.flatten() for buffer in alike])
        dist.broadcast(flat, 0)
        parts = flat.split([buffer.numel() for buffer in alike])
        for buffer, part in zip(alike, parts, strict=True):
            buffer.copy_(part.view_as(buffer))
