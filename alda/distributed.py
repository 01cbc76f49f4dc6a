"""torch.distributed for a run under torchrun. Who else is training?

    torchrun --nproc_per_node 4 -m alda.loop --strategy stal ...
    rank, world = rank_and_world()                  # (0, 1) without torchrun

Without torchrun every function here returns its input or does nothing. All but `rank_and_world` are
collective: every process has to call them, in the same order.
"""

import os

import torch
import torch.distributed as dist

from alda import InputError


def join(device: torch.device) -> torch.device:
    """Joins the processes that torchrun started, if it did; returns this process's device."""
    alone = int(os.environ.get("WORLD_SIZE", 1)) == 1
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
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device


def leave() -> None:
    """The end of a run."""
    if rank_and_world()[1] > 1:
        dist.destroy_process_group()


def rank_and_world() -> tuple[int, int]:
    """(rank, number of processes); (0, 1) without torchrun."""
    together = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if together else (0, 1)


def barrier() -> None:
    """Waits until every process is here."""
    if rank_and_world()[1] > 1:
        dist.barrier()


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


def broadcast_buffers(model: torch.nn.Module) -> None:
    """Gives every process the buffers of rank 0.

    Without SyncBatchNorm (on CPUs) the running statistics of the processes differ.
    """
    if rank_and_world()[1] > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)
