"""The baseline of `bench train`: a plain torch loop over the same network, batch and optimiser, all images in memory.

Run as a process of its own, `python -m jobs.bench.bare_train RUN BATCH STEPS SKIP THREADS`; prints images per second.
It waits for a line on stdin before it measures, so that several can start together.
"""

import sys
import time

import numpy as np
import torch

from pipeline.loading.augment import to_float
from pipeline.loading.steps import fixed_batches
from pipeline.shards import index
from pipeline.training.run import open_run


def main(path: str, batch: int, steps: int, skip: int, threads: int) -> None:
    torch.set_num_threads(threads)
    run = open_run(path)
    split = index.load(run.data).split("train")
    batches = list(fixed_batches(split, run.config.augment, 256))
    images = torch.cat([batch.images for batch in batches])[: len(split)]
    images = to_float(images, torch.tensor(run.facts.mean), torch.tensor(run.facts.std))
    labels = torch.from_numpy(split.label.astype(np.int64))
    task = run.task("cpu")
    model, optimizer = task.phases[0].module, task.phases[0].optimizer
    smoothing = run.config.task.label_smoothing
    order = torch.randperm(len(images))
    print("ready", flush=True)
    sys.stdin.readline()
    for step in range(steps + skip):
        if step == skip:
            begin = time.perf_counter()
        chosen = order[torch.arange(step * batch, (step + 1) * batch) % len(order)]
        loss = torch.nn.functional.cross_entropy(model(images[chosen]), labels[chosen], label_smoothing=smoothing)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        task.after_step(batch, (step + 1) * batch)
    print(steps * batch / (time.perf_counter() - begin), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], *(int(word) for word in sys.argv[2:6]))
