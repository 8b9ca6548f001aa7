"""A program that trains, as one rank of several; what befalls it stands in its environment.

torchrun starts it by its file. `Rank` starts it without: forked from a process that has imported torch already, which
takes most of the time of a short run.
"""

import errno
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

import torch

import train

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["train", "torch._dynamo", "torch.distributed.fsdp"])


def main():
    rank, once, batches, full = os.environ["RANK"], os.environ.get("ONCE"), 0, [False, True]

    def validating(model, arguments, options):
        nonlocal batches
        batches += options.get("reduction") == "none"
        if options and f"{rank}:{batches}" == os.environ.get("SIGNAL_IN_VALIDATION"):
            os.kill(os.getpid(), signal.SIGUSR1)

    def observe(event, step, subject):
        if event == "folder":  # ranks need not look at the run's folder at the same moment
            time.sleep(float(os.environ.get("LATE", 0)) * int(rank))
        if event == "write" and subject.name != "best.pt":
            time.sleep(float(os.environ.get("SLOW_DISK", 0)))
        if event == "write" and os.environ.get("NO_ROOM") == subject.name and full.pop():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(subject))
        if event == "ready":
            subject.register_forward_pre_hook(validating, with_kwargs=True)
        if event != "step":
            return
        here = f"{rank}:{step}"
        if here == os.environ.get("SIGNAL_AT"):
            os.kill(os.getpid(), signal.SIGUSR1)
        if here == os.environ.get("DIE_AT") and not (once and Path(once).exists()):
            if once:
                Path(once).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if here == os.environ.get("HANG_AT"):
            os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(float(os.environ.get("SLEEP", 0)))

    reductions = count_reductions() if os.environ.get("COUNT") else []
    if backend := os.environ.get("BACKEND"):
        torch.compiler.set_default_backend(backend)
    try:
        train.main(observe=observe)
    finally:
        print("reductions:", len(reductions), file=sys.stderr)
        print("graphs:", torch._dynamo.utils.counters["stats"]["unique_graphs"], file=sys.stderr)


def count_reductions():
    """A list that receives an item for each reduction of all gradients over ranks."""
    from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

    reductions, init = [], torch.nn.parallel.DistributedDataParallel.__init__

    def reduce(state, bucket):
        if bucket.is_last():
            reductions.append(bucket)
        return default_hooks.allreduce_hook(None, bucket)

    def counting(self, *arguments, **options):
        init(self, *arguments, **options)
        self.register_comm_hook(None, reduce)

    torch.nn.parallel.DistributedDataParallel.__init__ = counting
    return reductions


def forked(arguments, environment, said, run=None):
    """What a forked process runs, `run` or the training of a command line: `said` is the file of all that it prints."""
    file = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.chdir(Path(said).parent)
    os.environ.update(environment)
    sys.argv = ["rank.py", *arguments]
    (run or main)()


class Rank:
    """A rank as a process of its own, in the folder `cwd`: it trains, or calls `run`. It does not outlive `finish`."""

    def __init__(self, arguments, cwd, run=None, **environment):
        self.said = Path(cwd) / f"said_by_rank_{environment['RANK']}"
        self.process = FORKS.Process(target=forked, args=(arguments, environment, self.said, run))
        self.process.start()

    def poll(self):
        return self.process.exitcode

    def kill(self):
        self.process.kill()

    def terminate(self):
        self.process.terminate()

    def communicate(self, timeout=120):
        """("", what it printed), after its end; killed where it takes too long."""
        self.process.join(timeout)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        return "", self.said.read_text() if self.said.exists() else ""

    @property
    def returncode(self):
        return self.process.exitcode


if __name__ == "__main__":
    main()
