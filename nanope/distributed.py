"""Where a program runs: its ranks under torchrun, its device and dtype, and copies between host and device."""

import contextlib
import dataclasses
import datetime
import gc
import os
import re
import resource
import sys
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from nanope.errors import first_line

# Peak dense FLOP/s of a GPU by a word of its name (NVIDIA's data sheets): bfloat16; float16 for the V100
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12, "A10G": 70e12}
PEAK_FLOPS |= {"V100": 125e12, "4090": 165e12}


# ---- ranks


@dataclasses.dataclass
class Ranks:
    """This process among those of torchrun; alone without it."""

    rank: int = 0
    world: int = 1
    local: int = 0

    @property
    def main(self) -> bool:
        """Whether this is the rank that writes files and messages."""
        return self.rank == 0

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """In-place sum over ranks."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def max(self, tensor: torch.Tensor) -> torch.Tensor:
        """In-place maximum over ranks."""
        if self.world > 1:
            dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return tensor

    def first(self, value):
        """The first rank's value (a plain object), on every rank."""
        if self.world > 1:
            box = [value]
            dist.broadcast_object_list(box)
            return box[0]
        return value

    def check_equal(self, number: int, device: torch.device, what: str) -> None:
        """ValueError on every rank unless all have the same number."""
        if self.world > 1:
            extremes = torch.tensor([number, -number], device=device)
            dist.all_reduce(extremes, dist.ReduceOp.MAX)
            if extremes.sum() != 0:
                raise ValueError(f"the ranks do not agree on {what}")

    def wait(self) -> None:
        """Until every rank is here."""
        if self.world > 1:
            dist.barrier()


@contextlib.contextmanager
def ranks_of(device_name: str, timeout: float = 600.0, tf32: bool = False):
    """Join torchrun's process group, where there is one, with NCCL for CUDA and gloo elsewhere. Yields (Ranks, device).
    Ranks wait `timeout` seconds for one another; RankError where one is gone."""
    number = lambda name, default: int(os.environ.get(name, default))  # noqa: E731
    ranks = Ranks(number("RANK", 0), number("WORLD_SIZE", 1), number("LOCAL_RANK", 0))
    device = pick_device(device_name, ranks)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        # TF32 only where asked: under bfloat16 the few products left in float32 make phases, and TF32 would make their
        # error 100 times larger
        torch.backends.cuda.matmul.allow_tf32 = tf32
        # sdpa takes cuDNN's attention first on compute capability 9 and 10, and passes it over where results must be
        # deterministic. On 10 it has spoilt generations silently (pytorch #193893)
        torch.backends.cuda.enable_cudnn_sdp(torch.cuda.get_device_capability(device)[0] != 10)
    if ranks.world > 1:
        cuda, wait = device.type == "cuda", datetime.timedelta(seconds=timeout)
        store = fresh_store(ranks, wait)
        dist.init_process_group(
            "nccl" if cuda else "gloo",
            store=store,
            rank=ranks.rank,
            world_size=ranks.world,
            device_id=device if cuda else None,
            timeout=wait,
        )
    try:
        yield ranks, device
    except RuntimeError as error:
        if ranks.world > 1 and lost_rank(error):
            raise RankError(
                f"rank {ranks.rank} of {ranks.world} lost another rank, which has died or has not answered for "
                f"{timeout:g} s (rank_timeout); look at what that one said, and continue with --resume true "
                f"({first_line(error)})"
            ) from error
        raise
    finally:
        # NCCL's teardown is a collective: a rank that failed alone would wait in it for the others, before it had said
        # what went wrong
        if ranks.world > 1 and (device.type != "cuda" or sys.exception() is None):
            # DDP lies in reference cycles. Uncollected it keeps the group's threads alive, and about one process in six
            # aborts at its exit
            gc.collect()
            dist.destroy_process_group()


def fresh_store(ranks: Ranks, timeout: datetime.timedelta) -> dist.Store:
    """Where the ranks find one another. torchrun keeps one store over its restarts. In it a restarted rank would find
    the addresses of dead ones (pytorch #135712, #167288), so each restart gets a part of its own. Over several nodes
    the restarts are not counted alike; there TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for torchrun does the same
    (configs/slurm/train.sbatch)."""
    store, *_ = next(iter(dist.rendezvous("env://", ranks.rank, ranks.world, timeout=timeout)))
    one_node = os.environ.get("LOCAL_WORLD_SIZE") == str(ranks.world)
    return dist.PrefixStore(f"restart {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store) if one_node else store


class RankError(ValueError):
    """Another rank has died or hangs."""


def lost_rank(error: RuntimeError) -> bool:
    """Whether an error is that of a collective operation whose partner is gone."""
    words = ("gloo", "Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out waiting")
    return isinstance(error, dist.DistError) or any(word in str(error) for word in (*words, "NCCL", "Socket Timeout"))


def data_parallel(model: torch.nn.Module, ranks: Ranks, device: torch.device) -> torch.nn.Module:
    """The module that forward and backward go through: with several ranks one that averages gradients over them, else
    the model itself. compile_parts compiles the blocks one by one inside it: each block's gradients are reduced while
    the blocks below still compute theirs."""
    if ranks.world == 1:
        return model
    return DistributedDataParallel(
        model,
        device_ids=[device.index] if device.type == "cuda" else None,
        forward_sync_buffers=False,
        gradient_as_bucket_view=True,
    )


# ---- device and dtype


def pick_device(name: str, ranks: Ranks | None = None) -> torch.device:
    """The device called `name`; `auto` is cuda, else mps, else cpu; a rank takes the GPU of its local number."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", ranks.local if ranks else 0)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}") from error
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype called `name`; `auto` is bfloat16 on GPUs that have it, else float32; tf32 is float32 on CUDA alone."""
    if name == "auto":
        half = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        name = "bfloat16" if half else "float32"
    if name == "tf32":
        if device.type != "cuda":
            raise ValueError(f"dtype tf32 needs a CUDA device, not {device.type}: choose float32")
        return torch.float32
    return getattr(torch, name)


def evaluation_dtype(name: str, device: torch.device) -> torch.dtype:
    """pick_dtype for a command that scores. Products in float32 are float32 unless `name` is tf32, then in the whole
    process."""
    dtype = pick_dtype(name, device)
    torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
    return dtype


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Within it matrix products run in `dtype`; for float32 it changes nothing."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def compiler_works(device: torch.device) -> bool:
    """Whether torch.compile can build anything on this machine. Warns where it cannot."""
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(2, device=device))
        return True
    except Exception as error:
        text = f"warning: torch.compile does not work here, training goes on without it: {first_line(error)}"
        print(text, file=sys.stderr)
        return False


def peak_memory(device: torch.device) -> int:
    """Bytes: the allocator's peak on CUDA, else the process's peak resident size."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def peak_flops(device: torch.device) -> float | None:
    """FLOP/s of the device where they are known, else None."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    words = re.split("[ -]", name)
    if "PCIe" in words and "H100" in words:
        return 756e12
    return next((flops for word, flops in PEAK_FLOPS.items() if word in words), None)


# ---- between host and device


def pinned(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor in page-locked memory, from which a GPU copies without the host. Other devices: the tensor itself."""
    return tensor.pin_memory() if device.type == "cuda" else tensor


def to_device(arrays, device: torch.device) -> list[torch.Tensor]:
    """NumPy arrays as tensors on the device."""
    return [pinned(torch.from_numpy(a), device).to(device, non_blocking=True) for a in arrays]


def to_host(values: torch.Tensor) -> Callable[[], list[float]]:
    """Start to copy a few numbers to the host; the function that is returned waits for them."""
    if values.device.type != "cuda":
        return values.tolist
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    host.copy_(values, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()

    def wait() -> list[float]:
        arrived.synchronize()
        return host.tolist()

    return wait
