"""data/prepare.py with small units of work, so that little text takes the ways of much, and with a fault if asked for.

The tests of interruptions run it as a process. FAULT in the environment is a JSON list: event, pattern, count, action.
The action happens just before the count-th event (before each, where count is 0) whose file matches the pattern, in the
command or in one of its workers. Events: open, os.remove, os.rename (its new name counts).
"""

import json
import os
import re
import signal
import sys
import time
from pathlib import Path

from data.corpora import CORPORA, Subset
from data.prepare import main
from data.units import Sizes

SMALL = Sizes(least_unit=20_000, processes=0, batch=10_000)
# The table's sizes are those of the real corpus. What the tests' hub serves is small.
CORPORA["fineweb-edu"].subsets["sample-10BT"] = Subset({"train": "sample/10BT/*.parquet"}, 400_000, 747, 2)


def wait(path):
    print("working", flush=True)
    time.sleep(60)


def damage(path):
    shard = Path(path).with_name("val_00000.bin")
    content = bytearray(shard.read_bytes())
    content[10] ^= 1
    shard.write_bytes(content)


ACTIONS = {
    "kill": lambda path: os.kill(os.getpid(), signal.SIGKILL),
    "kill the parent": lambda path: os.kill(os.getppid(), signal.SIGKILL),
    "interrupt": lambda path: os.kill(os.getpid(), signal.SIGINT),
    "interrupt all": lambda path: os.killpg(0, signal.SIGINT),  # as a terminal's Ctrl-C
    "slow down": lambda path: time.sleep(0.01),
    "wait": wait,
    "damage a shard": damage,
}


def add_fault(event, pattern, count, action):
    seen = 0

    def hook(name, arguments):
        nonlocal seen
        if name == event:
            path = str(arguments[1 if event == "os.rename" else 0])
            if re.search(pattern, path):
                seen += 1
                if count in (0, seen):
                    ACTIONS[action](path)

    sys.addaudithook(hook)


if "FAULT" in os.environ:
    add_fault(*json.loads(os.environ["FAULT"]))
if __name__ == "__main__":
    main(sizes=SMALL)
