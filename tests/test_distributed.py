"""One, two and three processes take the very same step. This file is also the script that torchrun
starts: `work` runs in each process and leaves what it computed in a file."""

import contextlib
import copy
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import relative, state

import train

HERE = Path(__file__).resolve()
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node"]
EXACT = ["--padding", "exact"]
CASES = {  # batches of 7 and 5 of 12 utterances, and of 2 with three processes
    "full": ["--method", "full"],
    "partial, chunk, exact": ["--layers", "2", "--chunk", "2", *EXACT],
    "lora, chunk, recompute, exact": ["--method", "lora", "--chunk", "3", "--recompute", *EXACT],
    "cached, chunk": ["--layers", "2", "--chunk", "3", "--cache", "CACHE"],
    "fewer utterances than processes, exact": ["--layers", "1", "--batch-size", "2", *EXACT],
}


def gradients(model, dataset, args, epoch):
    """Of each batch of an epoch, dropout off, what a step would be given: loss and gradients."""
    trained, found = train.models.trainable(model.eval()), []
    optimizer = torch.optim.SGD(trained.values())
    for batch in train.make_batches(dataset, model, args, epoch):
        optimizer.zero_grad()
        rows, mine, chunks = train.load_batch(dataset, args, batch)
        predictions = train.predict(model, chunks, "cpu", args.cached, args.recompute)
        loss = train.ccc_loss(train.gather(predictions, mine, len(rows)), dataset.targets[rows])
        if loss.requires_grad:
            loss.backward()
        train.sum_gradients(optimizer)
        gradients = {name: p.grad.clone() for name, p in trained.items()}
        found.append(gradients | {"loss": loss.detach()})
    return found


def work(corpus, encoder, cached, out):
    """All cases, in float32 and float64, and an epoch with dropout, in this process."""
    found, single = {}, torch.Tensor.float
    torch.set_num_threads(1)

    def instead_of_fit(args, model, datasets, config):
        torch.nn.init.normal_(model.head.weight)
        found[name] = gradients(model, datasets["Train"], args, 1)
        found[f"{name}, evaluated"] = train.evaluate(model, datasets["Test1"], args)[0]
        torch.Tensor.float = torch.Tensor.double  # predict's word for what it hands to the model
        torch.set_default_dtype(torch.float64)
        double = copy.deepcopy(model).double()
        found[f"{name}, float64"] = gradients(double, datasets["Train"], args, 1)
        torch.set_default_dtype(torch.float32)
        torch.Tensor.float = single
        optimizer = torch.optim.AdamW(train.models.trainable(model).values(), 1e-2, fused=True)
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        train.train_epoch(model, datasets["Train"], optimizer, scaler, args, 1)
        weights = train.models.trainable(model).items()
        found[f"{name}, trained"] = {key: weight.detach() for key, weight in weights}

    train.fit = instead_of_fit
    if train.PROCESSES > 1:
        torch.distributed.init_process_group("gloo")
    common = ["--data", corpus, "--model", encoder, "--out", f"{out}/run", "--device", "cpu"]
    common += ["--precision", "fp32", "--batch-size", "7", "--lr", "0.01", "--workers", "1"]
    for name, options in CASES.items():
        options = [cached if option == "CACHE" else option for option in options]
        with contextlib.redirect_stdout(None):
            train.run(train.parse_args([*common, *options]))
    torch.save(found, f"{out}/of-{train.PROCESSES}-{train.RANK}.pt")


@pytest.fixture(scope="module")
def found(corpus, encoder, cached, tmp_path_factory):
    """found(processes, rank) -> what `work` saved there."""
    out = tmp_path_factory.mktemp("found")
    for n in (1, 2, 3):
        start = [sys.executable] if n == 1 else [*TORCHRUN, str(n)]
        line = [*start, str(HERE), corpus, encoder, cached(2), str(out)]
        done = subprocess.run(line, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    return lambda n, rank=0: torch.load(out / f"of-{n}-{rank}.pt")


@pytest.mark.parametrize("n", [2, 3])
def test_the_same_gradients(n, found):
    """Dropout off, loss and gradients of every batch in every row, in both paddings, in chunks and
    recomputed, are those of one process: to 2e-5 of the largest in float32, 1e-12 in float64."""
    one, several = found(1), found(n)
    cases = [name for name in one if not name.endswith(("evaluated", "trained"))]
    assert len(cases) == 2 * len(CASES)
    for name in cases:
        bound = 1e-12 if name.endswith("float64") else 2e-5
        for alone, shared in zip(one[name], several[name], strict=True):
            assert relative(shared, alone) < bound, name


@pytest.mark.parametrize("n", [2, 3])
def test_processes_agree(n, found):
    """After an epoch of steps with dropout all processes have the same weights, and all the same
    predictions of one process: to the bit."""
    one, first, *others = found(1), *(found(n, rank) for rank in range(n))
    for name, expected in one.items():
        if name.endswith("trained"):
            for other in others:
                assert all(torch.equal(other[name][k], w) for k, w in first[name].items())
            # dropout is drawn by each process for itself
            assert any(not torch.equal(first[name][k], w) for k, w in expected.items())
        elif name.endswith("evaluated"):
            assert all(torch.equal(each[name], expected) for each in (first, *others))


@pytest.mark.parametrize(("processes", "bound"), [(2, 1.9), (4, 3.5), (8, 4.6)])
def test_nobody_waits_long(processes, bound):
    """Chunks of 4 of batches of 32 with lengths like MSP-Podcast's, dealt out: all processes pass
    together that many times as many padded frames a step as the slowest one."""
    rng, speedups = np.random.default_rng(0), []
    for _ in range(200):
        # exponential, cut to 2.75 to 11 s, mean 5.65 s
        seconds = np.sort(2.75 - np.log(1 - rng.random(32) * (1 - np.exp(-8.25 * 0.2283))) / 0.2283)
        costs = []
        for rank in range(processes):
            shares = train.deal(32, 4, rank, processes)
            costs.append(sum(len(mine) * seconds[max(mine)] for mine, _ in shares))
        speedups.append(sum(costs) / max(costs))
    assert np.mean(speedups) >= bound


@pytest.mark.parametrize("processes", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("n", [1, 2, 5, 12, 32])
@pytest.mark.parametrize("chunk", [1, 4, 32])
def test_each_utterance_once(n, chunk, processes):
    """Whatever the numbers, each utterance of a batch is dealt to one process, in one chunk."""
    shares = [p for rank in range(processes) for p in train.deal(n, chunk, rank, processes)]
    assert sorted(p for mine, _ in shares for p in mine) == list(range(n))
    assert all(set(mine) <= set(whole) and len(whole) <= chunk for mine, whole in shares)


def start(n, line):
    """train.py under torchrun, as a process."""
    line = [*TORCHRUN, str(n), str(HERE.parent.parent / "train.py"), *map(str, line)]
    return subprocess.Popen(line, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_killed_and_resumed(corpus, encoder, launch, tmp_path):
    """With torchrun, only the first process writes and prints; after SIGKILL of the second the run
    ends everywhere, --resume goes on, and all ends bitwise as undisturbed. Another number of
    processes is refused."""
    common = ["--data", corpus, "--model", encoder, "--device", "cpu", "--lr", "0.01"]
    common += ["--precision", "fp16", "--batch-size", "4", "--workers", "1"]
    line = [*common, "--epochs", "2", "--out"]
    whole = start(2, [*line, tmp_path / "whole"])
    out, _ = whole.communicate()
    assert whole.returncode == 0 and out.count("epoch 1/2") == 1 == out.count("Test1 with epoch")
    killed = start(2, [*common, "--epochs", "2", "--out", tmp_path / "parts"])
    while not (tmp_path / "parts" / "last.pt").exists():
        assert killed.poll() is None
        time.sleep(0.01)
    children = Path(f"/proc/{killed.pid}/task/{killed.pid}/children").read_text().split()
    victim = [c for c in children if b"RANK=1\0" in Path(f"/proc/{c}/environ").read_bytes()]
    os.kill(int(victim[0]), 9)
    _, err = killed.communicate()
    assert "error: another process has ended" in err and 'train.py", line' not in err
    assert killed.returncode != 0 and not (tmp_path / "parts" / "result.json").exists()
    with pytest.raises(ValueError, match="last.pt is of a run with .*processes 2, not 1"):
        launch(tmp_path / "parts", "--resume")
    start(2, [*line, tmp_path / "parts", "--resume"]).communicate()
    assert state(tmp_path / "parts") == state(tmp_path / "whole")


if __name__ == "__main__":
    work(*sys.argv[1:])
