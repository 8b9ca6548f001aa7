"""Train one run: `python train.py --config FILE [--field value …]`, or the same under torchrun.

Data → windows chosen by (data_seed, step) → model → loss → AdamW, with checkpoints, validation and metrics.jsonl in
out_dir. The order of data, dropout and validation depend on the step alone, never on what happened before. So an
interrupted run that is continued (`--resume true`) ends as one that was not interrupted: on a CPU with the same bits,
and on a GPU with `--deterministic true`.

Read run() from top to bottom: what a run is made of, then the loop. What it calls is in nanope/: optim.py (optimizer,
learning rate, batch sizes), feed.py (batches, validation), checkpoint.py, run_folder.py (resume, lock, signals),
log.py, distributed.py (ranks, device, dtype), config.py.
"""

import contextlib
import math
import os
import signal
import sys
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from data.shards import as_path, open_data, output
from nanope import checkpoint, schedule
from nanope.checkpoint import Keeper, Progress, build_model
from nanope.config import RunConfig, check, parse, with_vocabulary, write_yaml
from nanope.diff import differences
from nanope.distributed import (
    HostCopies,
    Ranks,
    accumulating,
    autocast,
    compiler_works,
    data_parallel,
    gathered,
    pinned,
    ranks_of,
    settle_buckets,
    shard,
    to_host,
    use_dtype,
    whole,
)
from nanope.errors import first_line
from nanope.feed import Feed, Sampler, Validation, check_splits, diverged
from nanope.initial import describe_tokens, initial_model
from nanope.log import Log, check_wandb, environment, title
from nanope.optim import (
    gpu_micro_batch,
    learning_rate,
    make_optimizer,
    out_of_memory,
    resolve_batch,
    seed_generators,
    step_seed,
)
from nanope.run_folder import Stop, as_begun, find_state, locked, resumed_if_restarted


def unobserved(event: str, step: int, subject: object) -> None:
    """The observer of a run that nobody observes; see train."""


def train(config: RunConfig, observe: Callable = unobserved, ahead: int | None = None) -> dict:
    """Run `config` to its end, or to a signal. Returns {"step", "val_loss", "signal"}: steps completed, the last
    validation loss in nats per token, the signal that ended it or 0. ValueError or OSError for what a user can mend.

    observe(event, step, subject) is called, on every rank, with the number of steps completed:
        "folder"    before the run looks in out_dir for a run to resume; subject: the config
        "ready"     before the first validation and step; subject: the model
        "step"      before an optimizer step is launched; subject: the model
        "launched"  when it has been, before its outcome is read; subject: the model
        "write"     before a checkpoint's file is written, in the thread that writes it; subject: its path
    ahead: how many steps may be launched before the outcome of the oldest is read; None is 1 on CUDA, so that a GPU
    never waits for the host, and else 0. Both are for tests and tools.
    """
    check(config)
    with ranks_of(config.device, config.rank_timeout, config.deterministic) as (ranks, device):
        return run(config, ranks, device, observe, (1 if device.type == "cuda" else 0) if ahead is None else ahead)


@dataclass
class Outcome:
    """A step's numbers on their way from the device to the host."""

    step: int  # steps completed with it
    rate: float  # its learning rate
    read: Callable[[], list[float]]  # waits for them: gradient norm, mean losses, with several ranks Stop.flags summed
    names: list[str]  # of the mean losses
    losses: list[torch.Tensor]  # of this rank's micro-steps, each with its weight


def due(step: int, interval: int) -> bool:
    """Whether what happens every `interval` steps (0: never) happens after step `step`."""
    return bool(interval) and step % interval == 0


def run(config: RunConfig, ranks: Ranks, device: torch.device, observe: Callable, ahead: int) -> dict:
    """One run on this rank; see train."""
    # ---- Data, and this rank's share of each step's batch
    dtype, folder = use_dtype(config.dtype, device), Path(config.out_dir)
    check_wandb(config)
    data = open_data(config.data_dir, verify=config.verify_data or None)
    config = with_vocabulary(config, data.vocab_size, data.eot)
    share, micro = resolve_batch(config, ranks)  # windows a step, windows a forward pass
    check_splits(data, config)

    # ---- The model: that of the checkpoint to resume from, or a new one. Nothing is written before `locked`
    observe("folder", 0, config)
    config = resumed_if_restarted(config, ranks)
    state = find_state(config, data, ranks)
    config = as_begun(config, state)
    what = f"the step to resume from: {folder} must be one folder, shared by all nodes"
    ranks.check_equal(state["step"] if state else 0, device, what)
    with errors_explained(config, None, device):
        model, taken = (build_model(state), None) if state else initial_model(config, data.tokenizer_hash)
        describe_tokens(model, data)
        model.activation_checkpointing = config.activation_checkpointing
        if sharded := config.fsdp and ranks.world > 1:
            shard(model, ranks, device)
        else:
            model.to(device)
    if config.micro_batch_size in (None, "auto"):
        found = state["config"]["micro_batch_size"] if state else None
        if found and share % found == 0:
            micro = found
        elif device.type == "cuda":
            micro = gpu_micro_batch(config, model, share, ranks, device, dtype)
    config = replace(config, micro_batch_size=micro, pos_options=model.config.pos_options)
    validation = Validation(data.split("val"), config, micro, ranks, device, sharded)

    with errors_explained(config, share, device), contextlib.ExitStack() as closing:
        # ---- The run's folder, the optimizer, and the state of a checkpoint
        closing.enter_context(locked(folder, ranks))
        optimizer = make_optimizer(model, config)
        scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
        progress = checkpoint.restore(state, optimizer, scaler) if state else Progress()
        del state
        if ranks.main and progress.step < config.max_steps:  # a finished run keeps the record of how it was made
            write_yaml(config, folder / "config.yaml")

        # ---- What runs beside the model
        if config.compile and compiler_works(device):
            model.compile_parts(mode=config.compile_mode)
        parallel = data_parallel(model, ranks, device)  # what forward and backward go through
        feed = Feed(data.split("train"), config, share, micro, ranks, device)
        closing.callback(feed.close)
        sampler = Sampler(data, config, device, dtype) if config.sample_interval else None
        facts = environment(config, model, device, dtype, ranks.world, data.hash)
        watched = progress.watched == progress.step
        log = closing.enter_context(Log(config, ranks, device, model.flops_per_token(), facts, progress.step, watched))
        copies = HostCopies(ranks.main)
        take = partial(checkpoint.snapshot, model, optimizer, scaler, config, data, progress, copies)
        keeper = closing.enter_context(Keeper(config, progress, take, ranks, log, observe))
        stop = closing.enter_context(Stop())
        observe("ready", progress.step, model)

        if progress.step == 0:
            log.say(title(config, model, ranks, share, data.epoch_tokens("train", config.block_size), device, dtype))
            if taken:
                log.say(taken)
        elif progress.step >= config.max_steps:
            log.say(f"{folder} is at step {progress.step} of {config.max_steps}: nothing to do")
        if progress.step < config.max_steps and (text := schedule.warning(config)):
            log.say(f"warning: {text}")

        def validate_and_sample() -> bool:
            """Whether the validation loss is the lowest so far. A signal puts off both until the run is resumed."""
            step, lowest = progress.step, False
            seed_generators(step_seed(config, step, f"validation {ranks.rank}"))
            if step in (0, config.max_steps) or due(step, config.eval_interval):
                with gathered(model):
                    loss = validation.loss(model, dtype, stop)
                if loss is None:
                    return False
                progress.val_loss = loss
                log.validation(step, loss)
                # As the first rank has it, which goes back to the one before where best.pt could not be written
                lowest = ranks.first(step > 0 and loss < progress.best_val_loss)
            if step and due(step, config.sample_interval) and (ranks.main or sharded):
                with gathered(model):
                    text = sampler.text(model, step)
                log.sample(step, text)
            progress.watched = step
            return lowest

        if progress.watched != progress.step:  # before the first step, or put off by a signal
            lowest = validate_and_sample()
            # The checkpoint of a step that was due does not have its validation yet
            again = progress.step == config.max_steps or due(progress.step, config.checkpoint_interval)
            keeper.save(step=bool(stop.agreed) or progress.step > 0 and again, best=lowest)

        # ---- The loop
        pending: deque[Outcome] = deque()
        checkpoint_owed = False
        if progress.step < config.max_steps:
            settle_buckets(parallel, micro, device, dtype)
        log.start_clock(progress.step)
        while progress.step < config.max_steps and not stop.agreed:
            observe("step", progress.step, model)
            rate = learning_rate(progress.step, config)
            for group in optimizer.param_groups:
                group["lr"] = rate * group["lr_multiplier"]
            seed_generators(step_seed(config, progress.step, ranks.rank))  # for dropout, and what else may be drawn

            # Forward and backward, a micro-batch at a time
            losses, auxiliaries = [], []
            with gathered(model), model.parameters_fixed(step_seed(config, progress.step, "positions")):
                for i, (x, y, weight) in enumerate(feed.batches(progress.step)):  # (micro, T) int64 each
                    last = i == share // micro - 1  # DDP reduces gradients over ranks once a step
                    with accumulating(parallel, last):
                        with autocast(device, dtype):
                            _, loss = parallel(x, y)
                            auxiliary = model.auxiliary()  # a loss of the scheme's own, or None
                        losses.append(loss.detach() * weight)
                        if auxiliary is not None:
                            auxiliaries.append(auxiliary.detach() * weight)
                            loss = loss + auxiliary
                        scaler.scale(loss * weight).backward()

            # Clip
            scaler.unscale_(optimizer)
            gradient = whole(torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip or math.inf))

            # Step. One whose loss or gradient is not finite is skipped, by all ranks and on the device itself
            by_name = {"train/loss": losses} | ({"train/auxiliary": auxiliaries} if auxiliaries else {})
            means = torch.stack([sum(parts) for parts in by_name.values()]) / ranks.world
            if ranks.world > 1:
                flags = pinned(torch.tensor(stop.flags()), device).to(device, non_blocking=True)
                means = ranks.sum(torch.cat((means, flags)))
            finite = torch.isfinite(gradient) & torch.isfinite(means[: len(by_name)]).all()
            if device.type != "mps" or finite:
                optimizer.found_inf = (~finite).float()  # fused AdamW does nothing where this is 1
                optimizer.step()  # not scaler.step(), which looks at the gradients alone
            scaler.update()  # float16: a lower scale where a gradient was not finite
            optimizer.zero_grad(set_to_none=parallel is model)  # DDP's stay in its buckets
            progress.step += 1
            read = to_host(torch.cat((gradient.reshape(1), means)))
            pending.append(Outcome(progress.step, rate, read, [*by_name], losses))
            observe("launched", progress.step, model)

            # Log. A GPU must not wait for the host: a step's outcome is read after the next step has been launched, or
            # at once where something is due
            end = progress.step == config.max_steps
            checkpoint_owed = checkpoint_owed or due(progress.step, config.checkpoint_interval)
            if ranks.world == 1:
                stop.agreed = stop.received
            intervals = (config.log_interval, config.eval_interval, config.sample_interval)
            now = end or checkpoint_owed or any(due(progress.step, n) for n in intervals)
            while len(pending) > (0 if now or stop.agreed else ahead):
                outcome = pending.popleft()
                norm, *numbers = outcome.read()
                logged = dict(zip(outcome.names, numbers))
                stop.agree(numbers[len(logged) :])
                if all(map(math.isfinite, (norm, *logged.values()))):
                    progress.bad_steps = 0
                    if due(outcome.step, config.log_interval) or outcome.step == config.max_steps:
                        log.training(outcome.step, logged, outcome.rate, norm)
                else:
                    progress.bad_steps += 1
                    log.skipped(outcome.step, logged["train/loss"], outcome.rate, norm)
                    if progress.bad_steps >= config.max_bad_steps:
                        good = keeper.good_until(outcome.step - progress.bad_steps)
                        why = diverged(outcome.step, outcome.rate, outcome.losses, progress.bad_steps, feed, config)
                        raise ValueError(f"{why}; {good}")
            log.progress(progress.step)

            with log.clock_stopped():
                # Validate. After a signal only the checkpoint is written
                lowest = not stop.agreed and validate_and_sample()

                # Checkpoint. While steps are bad, none takes the place of a good one
                write = end or bool(stop.agreed) or (checkpoint_owed and not progress.bad_steps)
                keeper.save(step=write, best=lowest)
                checkpoint_owed = checkpoint_owed and not write

        keeper.finish(stop.agreed)
        return {"step": progress.step, "val_loss": progress.val_loss, "signal": stop.agreed}


@contextlib.contextmanager
def errors_explained(config: RunConfig, share: int | None, device: torch.device):
    """Within it a ValueError says what to do about a memory that is too small, and what `deterministic` forbids.
    `share`: windows of a rank in a step; None before there is a model to take them."""
    try:
        yield
    except RuntimeError as error:
        if config.deterministic and "deterministic" in str(error):
            raise ValueError(f"deterministic true cannot be had with this model here: {first_line(error)}") from error
        if isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error):
            raise ValueError(out_of_memory(error, config, share, device)) from error
        raise


# ---- the command


def modes(parser) -> None:
    """Arguments that are no fields of a run."""
    text = "Print parameters, FLOPs, memory and hours of the run; train nothing."
    parser.add_argument("--plan", action="store_true", help=text)
    text = "With --plan: a table of all schemes at the run's shape."
    parser.add_argument("--schemes", action="store_true", default=None, help=text)
    parser.add_argument("--gpus", type=int, help="With --plan: the number of GPUs (default: the ranks of this launch).")
    text = "With --plan: the model FLOPs utilisation to expect (default: a guess by GPU)."
    parser.add_argument("--mfu", type=float, help=text)
    parser.add_argument("--price_per_hour", type=float, help="With --plan: price of an hour of one GPU.")
    text = "Print where the config differs from that of a run's folder; train nothing. Exit status 1 where it does."
    parser.add_argument("--diff", metavar="RUN", help=text)


def main(arguments: list[str] | None = None, observe: Callable = unobserved) -> None:
    """The command line (default: that of this process). Exits with 1 and one line for what a user can mend; with 75
    after a signal from a scheduler, which asks it to start the job again; with 130 after Ctrl-C."""
    try:
        config, mode = parse(arguments, modes)
        of_plan = [name for name in ("schemes", "gpus", "mfu", "price_per_hour") if mode[name] is not None]
        if of_plan and not mode["plan"]:
            raise ValueError(
                f"--{of_plan[0]} goes with --plan, which trains nothing; without it this would start a run"
            )
        if mode["plan"] and mode["diff"] is not None:
            raise ValueError("--plan and --diff are two questions: give one of them")
        if mode["diff"] is not None:
            check(config)
            run = as_path(mode["diff"])
            lines = differences(config, run)
            output("\n".join(lines) or f"no difference from {run}")
            sys.exit(int(bool(lines)))
        if mode["plan"]:
            from nanope.plan import plan_text

            if text := schedule.warning(config):
                print(f"warning: {text}", file=sys.stderr)
            costs = {name: mode[name] for name in ("schemes", "gpus", "mfu", "price_per_hour")}
            return output(plan_text(config, **costs))
        result = train(config, observe)
    except (ValueError, OSError) as error:
        if dist.is_initialized():  # by ranks_of, which leaves it so: NCCL could wait at exit for ranks that do not come
            print(f"error: {error}", file=sys.stderr, flush=True)
            os._exit(1)
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("interrupted: the last checkpoint, if there is one, is where --resume true continues", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    if result["signal"]:
        sys.exit(128 + signal.SIGINT if result["signal"] == signal.SIGINT else os.EX_TEMPFAIL)


if __name__ == "__main__":
    for number in (signal.SIGTERM, signal.SIGUSR1):  # until the run handles them: there is nothing to save yet
        signal.signal(number, lambda *_: sys.exit(os.EX_TEMPFAIL))
    main()
