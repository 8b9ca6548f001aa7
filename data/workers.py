"""Does units of work in processes of their own."""

import concurrent.futures
import contextlib
import multiprocessing
import multiprocessing.connection
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path

from data.encode import Report, encode_units
from data.shards import DataError
from data.units import Sizes, Unit

# What a pipe raises after the process at its other end has ended: to send, and to send or receive
BROKEN = (BrokenPipeError, ConnectionResetError)
GONE = (EOFError, *BROKEN)


def do_in_processes(
    units: Iterable[Unit | None],
    workers: int,
    folder: Path,
    plan: dict,
    sizes: Sizes,
    report: Report,
    done: Callable[[Unit], None],
) -> None:
    """Do the units in up to `workers` processes. A unit None means that the next one is not there yet.

    report(…) is called on the progress of any of them, done(unit) as each ends. All processes end with this function.
    """
    context = multiprocessing.get_context("spawn")  # the same on every system, and safe beside other libraries' threads
    processes, idle, busy, units = [], [], set(), iter(units)
    exhausted = False
    try:
        while busy or not exhausted:
            while not exhausted and (idle or len(processes) < workers):
                unit = next(units, "end")
                exhausted = unit == "end"
                if exhausted or unit is None:
                    break
                if not idle:
                    pipe, theirs = context.Pipe()
                    process = context.Process(target=_work, args=(theirs, folder, plan, sizes), daemon=True)
                    processes.append(process)
                    # It inherits that Ctrl-C, which is for the parent, is blocked.
                    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
                    process.start()
                    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
                    theirs.close()  # so that the end of the process ends the pipe
                    idle.append(pipe)
                busy.add(pipe := idle.pop())
                pipe.send(unit)
            if not busy and not exhausted:
                time.sleep(0.1)  # a download is awaited
            for pipe in multiprocessing.connection.wait(busy, 0.1):
                kind, value = pipe.recv()
                if kind == "failed":
                    raise value
                if kind == "progress":
                    counts, found = value
                    report(*counts, found=found)
                else:
                    busy.remove(pipe)
                    idle.append(pipe)
                    done(value)
    except GONE:
        raise DataError("a worker process died, perhaps for want of memory; try fewer --workers") from None
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.join()


def in_background(function: Callable, *arguments: object) -> concurrent.futures.Future:
    """A Future of function(*arguments), which a daemon thread runs: it does not hold up the end of the program."""
    future = concurrent.futures.Future()

    def run() -> None:
        try:
            future.set_result(function(*arguments))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def _work(pipe: Connection, folder: Path, plan: dict, sizes: Sizes) -> None:
    """A worker process: does the units that come through the pipe. Sends back progress, end or failure of each."""

    def report(*counts: int, found: bool = False) -> None:
        pipe.send(("progress", (counts, found)))

    def done(unit: Unit) -> None:
        pipe.send(("done", unit))

    def units() -> Iterator[Unit]:
        with contextlib.suppress(EOFError):  # the parent is gone
            while True:
                yield pipe.recv()

    with contextlib.suppress(*BROKEN):  # likewise
        try:
            encode_units(units(), folder, plan, report, done, sizes=sizes)
        except BROKEN:
            raise
        except (DataError, OSError) as error:
            pipe.send(("failed", error))
        except BaseException:
            pipe.send(("failed", RuntimeError(f"in a worker process:\n{traceback.format_exc()}")))
