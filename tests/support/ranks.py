"""Real processes in a group of torch.distributed, on which tests run functions of theirs."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist

# A rank that waits for another in vain is given up after this many seconds.
TIMEOUT = 60.0


class Failed(AssertionError):
    """What went wrong on a rank, as its traceback."""


class Ranks:
    """Processes with a rank each, connected by gloo."""

    def __init__(self, world: int, timeout: float = TIMEOUT) -> None:
        self._world, self._timeout = world, timeout
        self._start()

    def _start(self) -> None:
        world, timeout = self._world, self._timeout
        context = multiprocessing.get_context("forkserver")
        # Imported once: torch, and what its DistributedDataParallel imports for seconds.
        context.set_forkserver_preload(["torch._dynamo", "tests.support.mishaps", "tests.support.unusual"])
        self._folder = tempfile.TemporaryDirectory()
        self.processes = []
        self._pipes = []
        for rank in range(world):
            ours, theirs = context.Pipe()
            arguments = (rank, world, os.path.join(self._folder.name, "store"), timeout, theirs)
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            self.processes.append(process)
            self._pipes.append(ours)

    def run(self, function: Callable[..., Any], *arguments: Any, **named: Any) -> list[Any]:
        """What a function of a module, called with its rank first, returns on every rank; Failed where it raises."""
        self.send(function, *arguments, **named)
        answers = [self.answer(rank) for rank in range(len(self._pipes))]
        if failures := [f"rank {rank}:\n{result}" for rank, (fine, result) in enumerate(answers) if not fine]:
            self.close()  # a collective that one of them has missed would disturb all that come
            self._start()
            raise Failed("\n".join(failures))
        return [result for _, result in answers]

    def send(self, function: Callable[..., Any], *arguments: Any, **named: Any) -> None:
        """Has every rank begin."""
        for pipe in self._pipes:
            pipe.send((function, arguments, named))

    def answer(self, rank: int) -> tuple[bool, Any]:
        """Whether the function has returned there, and what; otherwise what went wrong."""
        try:
            return self._pipes[rank].recv() if self._pipes[rank].poll(2 * TIMEOUT) else (False, "has not answered")
        except EOFError:
            return False, "is gone"

    def close(self) -> None:
        """Ends the processes."""
        for pipe in self._pipes:
            pipe.close()
        for process in self.processes:
            process.join(5)
            if process.is_alive():
                process.kill()
        self._folder.cleanup()


@contextmanager
def ranks(world: int, timeout: float = TIMEOUT) -> Iterator[Ranks]:
    """So many processes, for the time of a block."""
    processes = Ranks(world, timeout)
    try:
        yield processes
    finally:
        processes.close()


def _serve(rank: int, world: int, store: str, timeout: float, pipe: Connection) -> None:
    torch.set_num_threads(1)
    limit = timedelta(seconds=timeout)
    dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=world, timeout=limit)
    while True:
        try:
            function, arguments, named = pipe.recv()
        except (EOFError, OSError):
            return
        try:
            pipe.send((True, function(rank, *arguments, **named)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))
