"""Train one run: `python train.py --config FILE [--field value …]`, or the same under torchrun.

Data → windows chosen by (data_seed, step) → model → loss → AdamW, with checkpoints, validation and metrics.jsonl in
out_dir. The order of data, dropout and validation depend on the step alone, never on what happened before, so an
interrupted run continues as if it had not been (`--resume true`).
"""

import contextlib
import dataclasses
import fcntl
import gc
import hashlib
import importlib.util
import json
import math
import os
import random
import re
import resource
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import checkpoint
from config import RunConfig, check, parse, write_yaml
from data.shards import Split, WindowOrder, batch, open_data
from data.tokenizer import load_tokenizer
from model import GPT, resolve

# Peak dense FLOP/s of a GPU by a word of its name (NVIDIA's data sheets): bfloat16; float16 for the V100
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12, "A10G": 70e12, "V100": 125e12, "4090": 165e12}
# What a resumed run must have in common with its checkpoint: the model and the order of its data
FIXED_ON_RESUME = ("block_size", "n_layer", "n_head", "n_embd", "bias", "dropout", "vocab_size", "pos", "pos_options", "batch_tokens", "seed", "data_seed")


# ---- processes and devices


@dataclasses.dataclass
class Ranks:
    """This process among those of torchrun; alone without it."""

    rank: int = 0
    world: int = 1
    local: int = 0

    @property
    def main(self) -> bool:
        return self.rank == 0

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """In-place sum over ranks."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

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
def ranks_of(config: RunConfig):
    """Join torchrun's process group, where there is one, with NCCL for CUDA and gloo elsewhere; yields (Ranks, device)."""
    ranks = Ranks(*(int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))))
    device = pick_device(config.device, ranks)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        # No TF32: under bfloat16 the few products left in float32 make phases, and TF32 would cost them 100 times their error
    if ranks.world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", device_id=device if device.type == "cuda" else None)
    try:
        yield ranks, device
    finally:
        if ranks.world > 1:
            gc.collect()  # DDP, in reference cycles, would keep the group's threads alive: an abort at exit, about one run in six
            dist.destroy_process_group()


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
    if name == "auto":
        name = "bfloat16" if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    return getattr(torch, name)


def autocast(device: torch.device, dtype: torch.dtype):
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def compiler_works(device: torch.device) -> bool:
    """Whether torch.compile can build anything on this machine; warns where not."""
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(2, device=device))
        return True
    except Exception as error:
        print(f"warning: torch.compile does not work here, training goes on without it: {str(error).strip().splitlines()[0]}", file=sys.stderr)
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


# ---- from config to model, optimizer, schedule


def resolve_batch(config: RunConfig, ranks: Ranks) -> tuple[int, int]:
    """(windows a step and rank, windows a forward pass). ValueError that lists what fits."""
    windows = config.batch_tokens // config.block_size
    if windows % ranks.world:
        fits = [n for n in range(1, windows + 1) if windows % n == 0]
        raise ValueError(
            f"batch_tokens {config.batch_tokens} is {windows} windows of {config.block_size}, which do not divide over {ranks.world} ranks; "
            f"these numbers of ranks do: {', '.join(map(str, fits))}"
        )
    share = windows // ranks.world
    fits = [n for n in range(1, share + 1) if share % n == 0]
    micro = config.micro_batch_size or max([n for n in fits if n * config.block_size <= 16384] or [1])
    if micro not in fits:
        raise ValueError(
            f"batch_tokens {config.batch_tokens} is {windows} windows of {config.block_size}, {share} a rank: "
            f"micro_batch_size {micro} does not divide them; these do: {', '.join(map(str, fits))}"
        )
    return share, micro


def initial_model(config: RunConfig, tokenizer_hash: str) -> GPT:
    """A new model, or with init_from one with the weights of another, whose architecture the config must name and
    whose tokenizer must be the data's."""
    if config.init_from is None:
        return GPT(config.model_config(), seed=config.seed)
    if Path(config.init_from).is_file() or (Path(config.init_from) / "checkpoints").is_dir():
        state = checkpoint.load(checkpoint.find(config.init_from))
        if state["tokenizer"]["sha256"] != tokenizer_hash:
            raise ValueError(f"init_from {config.init_from} was trained with the tokenizer {state['tokenizer']['name']}, which is not that of {config.data_dir}")
    else:
        pretrained, gpt2 = GPT.from_pretrained(config.init_from), load_tokenizer("gpt2")
        if pretrained.config.vocab_size == gpt2.n_vocab and gpt2.sha256 != tokenizer_hash:
            raise ValueError(f"init_from {config.init_from} has GPT-2's vocabulary, and {config.data_dir} another tokenizer")
        state = {"config": dataclasses.asdict(pretrained.config), "model": pretrained.state_dict()}
    model = checkpoint.build_model(state, block_size=config.block_size, dropout=config.dropout)
    differ = []
    for name in ("n_layer", "n_head", "n_embd", "bias", "vocab_size", "pos", "pos_options"):
        have, asked = getattr(model.config, name), getattr(config, name)
        if name == "pos_options":  # options that the config does not name come with the weights
            have, asked = {k: have.get(k) for k in asked}, asked
        if have != asked:
            differ.append(f"--{name} {have} (the config says {asked})")
    if differ:
        raise ValueError(f"init_from {config.init_from} has another architecture than the config; it needs {', '.join(differ)}")
    return model


def make_optimizer(model: GPT, config: RunConfig) -> torch.optim.AdamW:
    """AdamW with every parameter in exactly one group: matrices with weight decay, vectors without, and the scheme's own
    positional parameters without and with pos_lr_multiplier."""
    positional = model.position_parameters()
    groups = {"decayed": [], "plain": [], "positional": []}
    for name, parameter in model.named_parameters():
        groups["positional" if name in positional else "decayed" if parameter.dim() >= 2 else "plain"].append(parameter)
    grouped = [id(p) for group in groups.values() for p in group]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters()), "a parameter is in no group or in two"
    return torch.optim.AdamW(
        [
            {"params": groups["decayed"], "weight_decay": config.weight_decay, "lr_multiplier": 1.0},
            {"params": groups["plain"], "weight_decay": 0.0, "lr_multiplier": 1.0},
            {"params": groups["positional"], "weight_decay": 0.0, "lr_multiplier": config.pos_lr_multiplier},
        ],
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        fused=next(model.parameters()).device.type in ("cuda", "cpu", "mps"),
    )


def learning_rate(step: int, config: RunConfig) -> float:
    """The learning rate of optimizer step `step`, counted from 0."""
    peak, last = config.learning_rate, config.max_steps
    if step < config.warmup_steps:
        return peak * (step + 1) / config.warmup_steps
    if config.schedule == "cosine":
        progress = (step - config.warmup_steps) / max(1, last - config.warmup_steps)
        return config.min_lr + (peak - config.min_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    if config.schedule == "step":
        return peak * config.lr_gamma ** (step // config.lr_step)
    if config.schedule == "wsd":
        decay = config.decay_fraction * last
        return config.min_lr + (peak - config.min_lr) * min(1.0, max(0.0, last - step) / decay)
    return peak


# ---- validation


class Validation:
    """Mean loss on fixed windows of the validation split, sharded over ranks, summed in float64; draws nothing."""

    def __init__(self, split: Split, config: RunConfig, rows: int, ranks: Ranks, device: torch.device):
        windows = (len(split) - 1) // config.block_size
        if windows < 1:
            raise ValueError(f"the val split of {config.data_dir} has {len(split)} tokens, fewer than one window of {config.block_size} + 1")
        count = max(1, min(windows, config.eval_tokens // config.block_size))
        starts = [config.block_size * (i * windows // count) for i in range(count)]  # evenly spread
        self.starts = starts[ranks.rank :: ranks.world]
        self.split, self.rows, self.block_size, self.ranks, self.device = split, rows, config.block_size, ranks, device

    @torch.no_grad()
    def loss(self, model: GPT, dtype: torch.dtype) -> float:
        model.eval()
        total = torch.zeros(2, dtype=torch.float64)
        for i in range(0, len(self.starts), self.rows):
            x, y = to_device(batch(self.split, self.starts[i : i + self.rows], self.block_size), self.device)
            with autocast(self.device, dtype):
                _, nll = model(x, y, reduction="none")
            total += torch.tensor([nll.cpu().double().sum(), nll.numel()], dtype=torch.float64)
        model.train()
        nll, count = self.ranks.sum(total.to(self.device) if self.device.type == "cuda" else total).tolist()
        return nll / count


def to_device(arrays, device: torch.device):
    tensors = [torch.from_numpy(a) for a in arrays]
    if device.type == "cuda":
        return [t.pin_memory().to(device, non_blocking=True) for t in tensors]
    return [t.to(device) for t in tensors]


# ---- logs


class Log:
    """metrics.jsonl, the progress line and, when asked, wandb. Only the first rank writes."""

    def __init__(self, config: RunConfig, run: Path, ranks: Ranks, step: int):
        self.main, self.max_steps = ranks.main, config.max_steps
        if not self.main:
            return
        path = run / "metrics.jsonl"
        if path.is_file():  # what an interrupted run logged beyond its checkpoint happens again
            checkpoint.write_atomically(path, lambda file: file.writelines(lines_until(path, step)))
        self.file = open(path, "a", buffering=1)
        self.wandb = start_wandb(config, run, resumed=step > 0) if config.wandb != "off" else None
        self.terminal = sys.stderr.isatty()
        self.bar = tqdm(total=config.max_steps, initial=step, desc=run.name, unit="step", disable=not self.terminal)
        self.started, self.first_step = time.monotonic(), step

    def write(self, **values) -> None:
        if self.main:  # JSON has no nan
            values = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
            self.file.write(json.dumps(values) + "\n")
            if self.wandb:
                self.wandb.log(values, step=values["step"])

    def say(self, text: str) -> None:
        if self.main:
            tqdm.write(text, file=sys.stderr)

    def progress(self, step: int, text: str | None = None) -> None:
        if not self.main:
            return
        self.bar.update(step - self.bar.n)
        if text is not None:
            if self.terminal:
                self.bar.set_postfix_str(text)
            else:
                left = (time.monotonic() - self.started) / max(1, step - self.first_step) * (self.max_steps - step)
                self.say(f"step {step}/{self.max_steps}  {text}  ETA {tqdm.format_interval(left)}")

    def close(self, failed: bool) -> None:
        if self.main:
            self.bar.close()
            self.file.close()
            if self.wandb:
                self.wandb.finish(exit_code=int(failed))


def lines_until(path: Path, step: int) -> list[bytes]:
    """The whole lines of metrics.jsonl up to a step; a fresh start (step 0) keeps none."""
    kept = []
    for line in path.read_bytes().splitlines(keepends=True):
        with contextlib.suppress(ValueError, TypeError, KeyError):  # a line cut short by the interruption
            if step > 0 and line.endswith(b"\n") and json.loads(line)["step"] <= step:
                kept.append(line)
    return kept


def start_wandb(config: RunConfig, run: Path, resumed: bool):
    os.environ.setdefault("WANDB_CACHE_DIR", str((run / "wandb" / "cache").resolve()))  # it would log under $HOME
    import wandb

    mode = config.wandb
    if mode == "online" and not wandb.login(prompt=False, verify=False):
        print("warning: wandb is not logged in (WANDB_API_KEY or `wandb login`): logging offline; `wandb sync` uploads later", file=sys.stderr)
        mode = "offline"
    # The id follows from the folder, so that a resumed run continues its curve
    identity = hashlib.sha256(str(run.resolve()).encode()).hexdigest()[:16]
    project = os.environ.get("WANDB_PROJECT", "nanope")

    def init(mode):
        return wandb.init(project=project, name=run.name, id=identity, resume="allow" if resumed else None, mode=mode, dir=run, config=dataclasses.asdict(config))

    try:
        return init(mode)
    except wandb.Error as error:
        print(f"warning: wandb cannot be reached, logging offline; `wandb sync` uploads later: {str(error).partition(chr(10))[0]}", file=sys.stderr)
        wandb.teardown()
        return init("offline")


# ---- interruption


class Stop:
    """Remembers SIGINT, SIGTERM or SIGUSR1 until the end of the step; a second Ctrl-C ends at once."""

    def __init__(self):
        self.signal = 0
        self.before = {s: signal.signal(s, self.handle) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}

    def handle(self, number, frame):
        self.signal = number
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def agreed(self, ranks: Ranks, device: torch.device) -> int:
        """The signal that any rank has received, or 0."""
        if ranks.world == 1:
            return self.signal
        flag = torch.tensor(self.signal, device=device)
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return int(flag)

    def restore(self):
        for number, handler in self.before.items():
            signal.signal(number, handler)


# ---- the run


def find_state(config: RunConfig, data_hash: str, ranks: Ranks) -> dict | None:
    """The checkpoint to resume from, or None to start. Changes nothing."""
    run = Path(config.out_dir)
    exists = (run / "config.yaml").exists() or (run / "metrics.jsonl").exists() or bool(checkpoint.step_files(run))
    if exists and not config.resume:
        raise ValueError(f"{run} already holds a run: continue it with --resume true, or choose another --out_dir")
    state = checkpoint.load_newest(run) if config.resume else None
    if state:
        check_resumable(state, config, data_hash)
        shown = {k: (state["config"][k], v) for k, v in vars(config).items() if k not in (*FIXED_ON_RESUME, "resume", "out_dir", "data_dir", "verify_data", "micro_batch_size")}
        changed = [f"{k} {then} → {now}" for k, (then, now) in shown.items() if then != now]
        if changed and ranks.main:
            print(f"warning: {run} goes on with other settings than it began with: {', '.join(changed)}", file=sys.stderr)
    return state


def prepare_run(run: Path, ranks: Ranks):
    """Make the run's folder, once every rank has seen what was there. Returns the first rank's lock on it, a file to keep
    open while the run lasts: two processes that train in one folder would mix their checkpoints."""
    ranks.wait()
    lock = None
    if ranks.main:
        (run / "checkpoints").mkdir(parents=True, exist_ok=True)
        lock = open(run / ".lock", "w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another process is training in {run}: wait for it, or choose another --out_dir") from None
        except OSError as error:
            print(f"warning: {run} is on a file system without locks ({error}): do not start a second run in it", file=sys.stderr)
        for left_over in [*run.glob(".*.partial"), *run.glob("checkpoints/.*.partial")]:
            left_over.unlink()
        if not os.access(run, os.W_OK):
            raise PermissionError(f"no permission to write in {run}")
    return lock


def check_resumable(state: dict, config: RunConfig, data_hash: str) -> None:
    """ValueError where the checkpoint's run differs in what its result depends on."""
    then = state["config"]
    # Options that the config does not name have their defaults, or with init_from came with the weights
    options = {**then["pos_options"], **config.pos_options} if config.init_from else resolve(config.model_config()).pos_options
    now = {**vars(config), "pos_options": options}
    differ = [f"{k} was {then[k]}, now {now[k]}" for k in FIXED_ON_RESUME if then[k] != now[k]]
    if state["data_hash"] != data_hash:
        differ.append(f"the data in {config.data_dir} is not what the run began with")
    if differ:
        raise ValueError(f"cannot resume {config.out_dir}: {'; '.join(differ)}. Choose another --out_dir for a different run")


def train(config: RunConfig) -> dict:
    """Run `config` to its end, or to a signal. Returns {"step", "val_loss", "signal"}: steps completed, the last
    validation loss in nats per token, the signal that ended it or 0. ValueError or OSError for what a user can mend."""
    check(config)
    with ranks_of(config) as (ranks, device):
        return run_training(config, ranks, device)


def run_training(config: RunConfig, ranks: Ranks, device: torch.device) -> dict:
    run, dtype = Path(config.out_dir), pick_dtype(config.dtype, device)
    if config.wandb != "off" and importlib.util.find_spec("wandb") is None:
        raise ValueError("wandb is not installed: pip install wandb, or --wandb off")
    data = open_data(config.data_dir, verify=config.verify_data or None)
    if config.vocab_size is None:
        config = dataclasses.replace(config, vocab_size=-(-data.vocab_size // 64) * 64)
    if config.vocab_size < data.vocab_size:
        raise ValueError(f"vocab_size {config.vocab_size} is smaller than the {data.vocab_size} of {config.data_dir}")
    share, micro = resolve_batch(config, ranks)
    split = data.split("train")
    order = WindowOrder(len(split), config.block_size, config.data_seed)
    validation = Validation(data.split("val"), config, micro, ranks, device)

    state = find_state(config, data.hash, ranks)
    ranks.check_equal(state["step"] if state else 0, device, f"the step to resume from: {run} must be one folder, shared by all nodes")
    raw_model = checkpoint.build_model(state) if state else initial_model(config, data.tokenizer_hash)
    config = dataclasses.replace(config, micro_batch_size=micro, pos_options=raw_model.config.pos_options)
    lock = prepare_run(run, ranks)
    raw_model.to(device)
    optimizer = make_optimizer(raw_model, config)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    step, best, bad_steps, val_loss = 0, math.inf, 0, math.nan
    if state:
        fields = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
        optimizer.load_state_dict(state["optimizer"])
        for group, now in zip(optimizer.param_groups, fields):  # weight decay, betas and the like are the config's
            group.update(now)
        if state["scaler"]:  # empty where the run was not float16
            scaler.load_state_dict(state["scaler"])
        step, best, bad_steps, val_loss = (state[k] for k in ("step", "best_val_loss", "bad_steps", "val_loss"))
        restore_generators(state["generators"], device)
    del state
    if ranks.main and step < config.max_steps:  # a finished run keeps the record of how it was made
        write_yaml(config, run / "config.yaml")

    model = torch.compile(raw_model) if config.compile and compiler_works(device) else raw_model
    if ranks.world > 1:
        model = DistributedDataParallel(
            model, device_ids=[device.index] if device.type == "cuda" else None, forward_sync_buffers=False, gradient_as_bucket_view=True
        )
    log, stop = Log(config, run, ranks, step), Stop()
    failed, flops, flops_per_token = True, peak_flops(device), raw_model.flops_per_token()
    if step == 0:
        c = config
        log.say(
            f"{run}: {c.pos} {c.pos_options}, {raw_model.parameter_count():,} parameters; {c.max_steps} steps of {c.batch_tokens:,} tokens "
            f"({share * ranks.world} windows of {c.block_size}, {ranks.world} rank(s) × {share // micro} × {micro}); "
            f"{len(split):,} training tokens, {c.max_steps * c.batch_tokens / len(split):.2f} epochs; {device}, {str(dtype).removeprefix('torch.')}"
        )
    try:
        if step == 0:
            val_loss = validation.loss(raw_model, dtype)
            log.write(**{"step": 0, "tokens": 0, "val/loss": val_loss})
        if step >= config.max_steps:
            log.say(f"{run} is at step {step} of {config.max_steps}: nothing to do")

        def state_now() -> dict:
            return snapshot(raw_model, optimizer, scaler, config, data, step, best, bad_steps, val_loss)

        clock, clock_step, saved, owed = time.monotonic(), step, step, False
        while step < config.max_steps:
            # --- one optimizer step
            rate = learning_rate(step, config)
            for group in optimizer.param_groups:
                group["lr"] = rate * group["lr_multiplier"]
            if config.dropout:  # dropout too depends on the step alone
                torch.manual_seed(int.from_bytes(hashlib.sha256(f"{config.seed}/{step}/{ranks.rank}".encode()).digest()[:8], "little") >> 1)
            starts = order.starts((step * ranks.world + ranks.rank) * share, share)
            loss_sum = torch.zeros((), device=device)
            for i in range(0, share, micro):
                x, y = to_device(batch(split, starts[i : i + micro], config.block_size), device)
                last = i + micro == share  # gradients are reduced over ranks once a step
                with contextlib.nullcontext() if last or ranks.world == 1 else model.no_sync():
                    with autocast(device, dtype):
                        _, loss = model(x, y)
                    scaler.scale(loss * (micro / share)).backward()
                loss_sum += loss.detach() * (micro / share)
            scaler.unscale_(optimizer)
            norm = torch.nn.utils.clip_grad_norm_(raw_model.parameters(), config.grad_clip or math.inf)
            loss_sum = ranks.sum(loss_sum) / ranks.world
            good = bool(torch.isfinite(norm) & torch.isfinite(loss_sum))  # the same on every rank
            if good:
                scaler.step(optimizer)
            scaler.update()  # lowers its scale where a gradient was not finite
            optimizer.zero_grad(set_to_none=True)
            step += 1

            # --- what is due after it
            bad_steps = 0 if good else bad_steps + 1
            if not good:
                log.say(f"warning: step {step} skipped: loss {loss_sum.item()}, gradient norm {norm.item()}")
                log.write(**{"step": step, "skipped": 1, "train/loss": None, "grad_norm": None, "lr": rate})
                if bad_steps >= config.max_bad_steps:
                    raise ValueError(
                        f"{bad_steps} steps in a row up to step {step} had a loss or gradient that is not finite (learning rate {rate:.3g}, "
                        f"windows at tokens {starts[:4].tolist()} …). Lower learning_rate, or look at the data there; the checkpoints in {run} are from before"
                        + (f", but step_{saved}.pt holds the very weights that failed: delete it to go back further" if 0 < step - bad_steps <= saved else "")
                    )
            log.progress(step)
            if good and (step % config.log_interval == 0 or step == config.max_steps):
                now = time.monotonic()
                speed = (step - clock_step) * config.batch_tokens / (now - clock)
                clock, clock_step = now, step
                memory, loss = peak_memory(device), loss_sum.item()
                mfu = speed * flops_per_token / (flops * ranks.world) if flops else None
                log.write(
                    **{"step": step, "tokens": step * config.batch_tokens, "train/loss": loss, "lr": rate, "grad_norm": norm.item()},
                    **{"tokens_per_s": speed, "mfu": mfu, "peak_memory": memory},
                )
                text = f"loss {loss:.4f}  lr {rate:.2e}  norm {norm.item():.2f}  {speed:,.0f} tokens/s  {memory / 2**30:.2f} GiB"
                log.progress(step, text + (f"  MFU {mfu:.1%}" if mfu else ""))
            interrupted = stop.agreed(ranks, device)
            paused = time.monotonic()
            end = step == config.max_steps
            if end or (config.eval_interval and step % config.eval_interval == 0):
                val_loss = validation.loss(raw_model, dtype)
                log.write(**{"step": step, "tokens": step * config.batch_tokens, "val/loss": val_loss})
                log.say(f"step {step}: validation loss {val_loss:.4f}")
                if val_loss < best:
                    best = val_loss
                    if ranks.main:
                        checkpoint.save(run / "best.pt", state_now())
            owed = owed or bool(config.checkpoint_interval) and step % config.checkpoint_interval == 0
            if end or interrupted or (owed and not bad_steps):  # while steps are bad, no checkpoint takes the place of a good one
                if ranks.main:
                    keep = config.keep_checkpoints if not bad_steps else sys.maxsize
                    checkpoint.save_step(run, state_now(), keep)
                saved, owed = step, False
                if end or interrupted:
                    ranks.wait()  # torchrun ends the others when one has left
            clock += time.monotonic() - paused  # tokens/s is of training alone
            if interrupted and not end:
                log.say(f"stopped by {signal.Signals(interrupted).name} after step {step}, checkpoint written: continue with --resume true")
                return {"step": step, "val_loss": val_loss, "signal": interrupted}
        failed = False
        return {"step": step, "val_loss": val_loss, "signal": 0}
    finally:
        stop.restore()
        log.close(failed)
        if lock:
            lock.close()


def snapshot(model, optimizer, scaler, config, data, step, best, bad_steps, val_loss) -> dict:
    """What a checkpoint holds: tensors and plain types only."""
    return {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scaler": scaler.state_dict(),
        "step": step,
        "config": dataclasses.asdict(config),
        "generators": generators(),
        "data_hash": data.hash,
        "tokenizer": dict(data.manifest["tokenizer"]),
        "best_val_loss": best,
        "val_loss": val_loss,
        "bad_steps": bad_steps,
    }


def generators() -> dict:
    version, internal, gauss = random.getstate()
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    return {"torch": torch.get_rng_state(), "cuda": cuda, "python": [version, list(internal), gauss]}


def restore_generators(state: dict, device: torch.device) -> None:
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"])
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))


def main() -> None:
    try:
        result = train(parse())
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("interrupted: the last checkpoint, if there is one, is where --resume true continues", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    if result["signal"]:
        sys.exit(128 + result["signal"])


if __name__ == "__main__":
    main()
