"""Where a program runs: its ranks under torchrun, its device and dtype, and copies between host and device."""

import contextlib
import dataclasses
import datetime
import gc
import os
import resource
import sys
from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from nanope.errors import first_line

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
def ranks_of(device_name: str, timeout: float = 600.0, deterministic: bool = False):
    """Join torchrun's process group, where there is one, with NCCL for CUDA and gloo elsewhere. Yields (Ranks, device).
    Ranks wait `timeout` seconds for one another; RankError where one is gone. deterministic: a GPU takes algorithms
    whose results do not depend on the order in which its threads end."""
    number = lambda name, default: int(os.environ.get(name, default))  # noqa: E731
    ranks = Ranks(number("RANK", 0), number("WORLD_SIZE", 1), number("LOCAL_RANK", 0))
    device = pick_device(device_name, ranks)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        if deterministic:
            be_deterministic()
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


def be_deterministic() -> None:
    """Equal bits from equal commands on CUDA, where PyTorch has such algorithms; where it has none it raises
    RuntimeError. For the rest of the process."""
    # cuBLAS and NCCL read these when they are first used
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ.setdefault("NCCL_ALGO", "Ring")  # one order of sums, whatever NCCL finds faster today
    # No warn_only: with it the attention kernels stay as they are. Inductor no longer chooses kernels by their speed
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # of which nothing here reads


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


# ---- several ranks: DDP, where each has the whole model, and FSDP, where each has a part of it


def data_parallel(model: torch.nn.Module, ranks: Ranks, device: torch.device) -> torch.nn.Module:
    """The module that forward and backward go through: with several ranks one that averages gradients over them, else
    the model itself; a model that `shard` has divided does it too. compile_parts compiles the blocks one by one inside
    it: each block's gradients are reduced while the blocks below still compute theirs."""
    if ranks.world == 1 or is_sharded(model):
        return model
    for p in model.parameters():  # in DDP's buckets from the first step on: else its passes would add up beside them
        if p.requires_grad:
            p.grad = torch.zeros_like(p)
    return DistributedDataParallel(
        model,
        device_ids=[device.index] if device.type == "cuda" else None,
        forward_sync_buffers=False,
        gradient_as_bucket_view=True,
    )


def settle_buckets(parallel: torch.nn.Module, micro: int, device: torch.device, dtype: torch.dtype) -> None:
    """Let DDP lay out its buckets of gradients before the first step, by a pass over `micro` windows without a step.

    It lays them out anew after the first pass whose gradients it sums, in the order of that pass. Sums over three or
    more ranks depend on the layout in their last bits. So a resumed run would differ in its first step from one that
    was never interrupted, and has the new layout by then.
    """
    if isinstance(parallel, DistributedDataParallel):
        model = parallel.module
        idx = torch.zeros(micro, model.config.block_size, dtype=torch.int64, device=device)
        with model.parameters_fixed(0):
            with autocast(device, dtype):
                _, loss = parallel(idx, idx)
                auxiliary = model.auxiliary()
            (loss if auxiliary is None else loss + auxiliary).backward()
        parallel.zero_grad(set_to_none=False)  # they stay in the buckets


@contextlib.contextmanager
def accumulating(parallel: torch.nn.Module, last: bool):
    """Around a micro-batch of a step. DDP averages gradients over the ranks after the `last` one. FSDP does after each:
    until then every rank would hold all of them, 4 bytes a parameter, which it is there to avoid."""
    waits = isinstance(parallel, DistributedDataParallel) and not last
    with parallel.no_sync() if waits else contextlib.nullcontext():
        yield
    if last and is_sharded(parallel):
        scalars = [p.grad for p in parallel.parameters() if not p.dim() and p.grad is not None]
        if scalars:
            means = torch.stack(scalars) / dist.get_world_size()
            dist.all_reduce(means)
            torch._foreach_copy_(scalars, list(means.unbind()))


def shard(model: torch.nn.Module, ranks: Ranks, device: torch.device) -> None:
    """Divide a GPT's parameters over the ranks, and with them gradients and the optimizer's state, by PyTorch's FSDP2.

    Each parameter becomes a DTensor, of which a rank has the rows of its part, in float32. A block gathers its
    parameters for its forward pass, again for its backward pass, and then reduces its gradients to their parts. The
    numbers are DDP's up to rounding. The model comes from the host and goes to the device a block at a time.

    Embedding, last norm and the schemes' own parameters are gathered within `gathered` alone: the loss and the hooks
    of a scheme read them outside of a block, and layers may share them. Scalars stay whole, and `accumulating` averages
    their gradients.
    """
    # Takes a second to import
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    scalars, blocks = {p for p in model.parameters() if not p.dim()}, model.transformer["h"]
    for parameter in scalars:
        parameter.data = parameter.data.to(device)
    divide = partial(fully_shard, mesh=init_device_mesh(device.type, (ranks.world,)), ignored_params=scalars)
    if own := [block.attn.pos for block in blocks if {*block.attn.pos.parameters()} - scalars]:
        divide(own, reshard_after_forward=False)  # one group, since they may share parameters
    for block in blocks:
        divide(block, reshard_after_forward=True)
    divide(model, reshard_after_forward=False)
    for kept in (model, *own[:1]):
        kept.set_reshard_after_backward(False, recurse=False)
    drop_casts(model)


def drop_casts(model: torch.nn.Module) -> None:
    """Let autocast keep no weights in its dtype beyond their block, which uses each once. To the end of a forward pass
    they would be a whole model on each rank."""
    clear = torch.compiler.disable(lambda *_: torch.clear_autocast_cache())
    for block in model.transformer["h"]:
        block.register_forward_hook(clear)


def is_sharded(model: torch.nn.Module) -> bool:
    """Whether `shard` has divided it."""
    return hasattr(model, "unshard")


@contextlib.contextmanager
def gathered(model: torch.nn.Module):
    """Around all that reads a model's parameters or goes through it: within it a model that `shard` has divided has
    whole those that lie outside of blocks, and blocks gather their own. Every rank must take part in it, in every
    forward pass, and in a step. Other models are whole anyway."""
    kept = [m for m in (model, *(block.attn.pos for block in model.transformer["h"])) if is_sharded(m)]
    for module in kept:
        module.unshard()
    try:
        yield
    finally:
        for module in kept:
            module.reshard()


def is_divided(tensor: torch.Tensor) -> bool:
    """Whether it is a DTensor, of which each rank has a part."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor that is divided, for which every rank must ask. Another one is itself."""
    return tensor.full_tensor() if is_divided(tensor) else tensor


def divided_as(tensor: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """A tensor that every rank has whole, such as a moment of AdamW in a checkpoint, divided as its parameter is. Where
    that is whole, the tensor itself."""
    if not is_divided(parameter):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = parameter.device_mesh, parameter.placements
    part = torch.empty_like(parameter.detach(), dtype=tensor.dtype)
    return part.copy_(distribute_tensor(tensor, mesh, placements, src_data_rank=None))  # each takes its own


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
    if device.type == "cuda":
        # sdpa takes cuDNN's attention first on compute capability 9 and 10, and passes it over where results must be
        # deterministic. On 10 it has spoilt generations silently (pytorch #193893)
        torch.backends.cuda.enable_cudnn_sdp(torch.cuda.get_device_capability(device)[0] != 10)
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


def use_dtype(name: str, device: torch.device) -> torch.dtype:
    """pick_dtype for the whole process: its products in float32 are TF32 where `name` is tf32, and else float32. Under
    bfloat16 the few that are left make phases, whose error TF32 would make 100 times larger."""
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


class HostCopies:
    """Copies of a run's tensors on the host, of one moment at a time.

    A GPU makes them while the host goes on, into page-locked memory, which is kept for the next moment's. They are
    ordered on the device: kernels that are launched later, as those of the next step, change a tensor after its copy.
    Only the first rank (main) has copies.
    """

    def __init__(self, main: bool = True):
        self.main, self.kept, self.count = main, [], 0

    def copy(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """Start to copy a tensor. A GPU's is there once `finish` says so."""
        if not self.main:
            return None
        if tensor.device.type != "cuda":
            return tensor.to("cpu", copy=True)
        number, self.count = self.count, self.count + 1
        host = self.kept[number] if number < len(self.kept) else None
        if host is None or (host.shape, host.dtype, host.stride()) != (tensor.shape, tensor.dtype, tensor.stride()):
            host = page_locked(tensor)
            self.kept[number : number + 1] = [host]
        return host.copy_(tensor, non_blocking=True)

    def finish(self) -> Callable[[], None]:
        """End a moment's copies; the function that is returned waits for them. The next moment's begin with the next
        `copy`, and go where these are: nobody may read them any more."""
        count, self.count = self.count, 0
        if not count:
            return lambda: None
        arrived = torch.cuda.Event()
        arrived.record()
        return arrived.synchronize


def page_locked(tensor: torch.Tensor) -> torch.Tensor:
    """Uninitialised page-locked memory for a copy of a tensor, with its strides where it has no gaps."""
    return torch.empty_like(tensor, device="cpu", pin_memory=True)
