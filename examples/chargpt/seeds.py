"""Each seed in a process of its own, so that they share the cores."""

import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context

import torch
from tqdm import tqdm

from examples.chargpt.contenders import contenders
from examples.chargpt.text import load
from examples.chargpt.train import Run, train

THREADS = 1  # for each seed: the network is small; and so the curves do not depend on the number of cores


def train_seeds(steps: int, deviation: float, seeds: int, adamw_lrs: Sequence[float]) -> dict[str, list[Run]]:
    """Of each optimizer one run for each seed."""
    context = get_context("spawn")  # a fork would copy torch, but not its threads
    workers = min(seeds, os.cpu_count() or 1)
    with ProcessPoolExecutor(workers, context, tqdm.set_lock, (context.RLock(),)) as pool:
        of_seeds = list(pool.map(partial(_train, steps, deviation, adamw_lrs), range(seeds)))
    return {name: [of_seed[name] for of_seed in of_seeds] for name in contenders(adamw_lrs)}


def _train(steps: int, deviation: float, adamw_lrs: Sequence[float], seed: int) -> dict[str, Run]:
    torch.set_num_threads(THREADS)
    optimizers = contenders(adamw_lrs)
    with tqdm(total=len(optimizers) * steps, desc=f"seed {seed}", position=seed, unit="step") as bar:
        return train(optimizers, load(), steps, deviation, seed, bar.update)
