"""Who else is training? What a run under torchrun needs; without torchrun every function here does nothing.

torchrun --nproc_per_node 4 -m alda.loop --strategy stal ...
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
                f"torchrun started more processes here than there are GPUs ({torch.cuda.device_count()})"
            )
        torch.cuda.set_device(device)  # events and streams without a device are this one's
    if alone:
        return device
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device


def leave() -> None:
    """The end of a run."""
    if rank_and_number()[1] > 1:
        dist.destroy_process_group()


def rank_and_number() -> tuple[int, int]:
    """(rank, number of processes); (0, 1) without torchrun."""
    together = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if together else (0, 1)


def wait() -> None:
    """Waits until every process is here."""
    if rank_and_number()[1] > 1:
        dist.barrier()


def add_up(values: torch.Tensor) -> torch.Tensor:
    """The sum of the processes' `values`, in place."""
    if rank_and_number()[1] > 1:
        dist.all_reduce(values)
    return values


def share_buffers(model: torch.nn.Module) -> None:
    """Gives every process the buffers of rank 0: without SyncBatchNorm (CPU) their running statistics differ."""
    if rank_and_number()[1] > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)
