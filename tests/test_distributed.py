"""One, two and three processes take the very same step: `work` runs in each of them, and leaves
what it computed in a file. Most are forked from this one, and set up as torchrun does."""

import contextlib
import copy
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import fork, read_cache, read_csv, relative, state

import cache
import model as models
import train

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
COMMON = ["--device", "cpu", "--lr", 0.01, "--workers", 1]
CASES = {  # batches of 7 and 5 of 12 utterances, and of 3 with up to three processes
    "full": ["--method", "full"],
    "partial": ["--layers", 2, "--chunk", 2],
    "lora": ["--method", "lora", "--chunk", 3, "--recompute"],
    "cached": ["--layers", 2, "--chunk", 3, "--cache", "CACHE"],
    "an utterance a process": ["--layers", 1, "--batch-size", 3],
}
# A run that fills its cache: of two processes, and of 11 Train utterances, the last is dropped.
RUN = ["--cache", "CACHE", "--precision", "fp16", "--batch-size", 4, "--epochs", 2, "--seed", 1]


# A script that calls train.main, and looks for threads of a process group that it leaves behind.
MAIN = f"""
import glob, sys
sys.path.insert(0, {str(Path(train.__file__).parent)!r})
import train
train.main()
names = [open(path).read() for path in glob.glob("/proc/self/task/*/comm")]
assert not any("gloo" in name for name in names), names
"""


class Recorder(torch.optim.SGD):
    """An optimizer that keeps each step's gradients, and takes none."""

    def step(self):
        parameters = self.param_groups[0]["params"]
        self.found = [*getattr(self, "found", []), [p.grad.clone() for p in parameters]]


def gradients(model, dataset, args):
    """{step: gradients} of train_epoch's steps, dropout off; and the steps' mean loss."""
    model.eval()
    model.train = lambda *_: model
    recorder = Recorder(models.trainable(model).values())
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    loss = train.train_epoch(model, dataset, recorder, scaler, args, 1)
    return {"loss": torch.tensor(loss, dtype=torch.float64), "steps": recorder.found}


@contextlib.contextmanager
def in_float64(model):
    """A copy of the model, and all that the scripts cast to float32, in float64."""
    single = torch.Tensor.float
    torch.Tensor.float = torch.Tensor.double
    torch.set_default_dtype(torch.float64)
    double = copy.deepcopy(model).double()
    normalised = double.normalised
    double.normalised = lambda *batch: normalised(*batch).double()
    yield double
    torch.Tensor.float = single
    torch.set_default_dtype(torch.float32)


def examine(found, name):
    """Instead of train.fit: found[name] = what this process computes of a case."""

    def instead_of_fit(args, model, datasets, config):
        dataset = datasets["Train"]
        torch.nn.init.normal_(model.head.weight)
        for key, parameter in model.named_parameters():
            if key.endswith("lora_b"):  # zero would keep any gradient from lora_a
                torch.nn.init.normal_(parameter, std=0.1)
        found[name] = {"float32": gradients(copy.deepcopy(model), dataset, args)}
        with in_float64(model) as double:
            found[name]["float64"] = gradients(double, dataset, args)
        found[name]["evaluated"] = train.evaluate(model, datasets["Test1"], args)[0]
        optimizer = torch.optim.AdamW(models.trainable(model).values(), 1e-2, fused=True)
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        train.train_epoch(model, dataset, optimizer, scaler, args, 1)
        found[name]["seed"] = torch.initial_seed()
        found[name]["trained"] = [p.detach() for p in models.trainable(model).values()]

    return instead_of_fit


def go(corpus, encoder, cached, out, *options):
    """train.run, as train.py's main calls it."""
    places = ["--data", corpus, "--model", encoder, "--out", out, *COMMON]
    options = [cached if option == "CACHE" else option for option in [*places, *options]]
    with contextlib.redirect_stdout(None):
        train.run(train.parse_args([str(option) for option in options]))


def work(corpus, encoder, cached, out):
    """All cases in both paddings, in this process; then what several processes do together."""
    torch.set_num_threads(1)
    found = {}
    fit = train.fit
    for padding in ("paper", "exact"):
        for name, options in CASES.items():
            train.fit = examine(found, f"{name}, {padding}")
            options = ["--precision", "fp32", "--batch-size", 7, "--padding", padding, *options]
            go(corpus, encoder, cached, f"{out}/{train.RANK}", *options)
    train.fit = fit
    if train.PROCESSES > 1:
        for key in ("arguments", "labels", "epochs"):
            place = f"{corpus}-{train.RANK}" if key == "labels" else corpus
            dropout = train.RANK / 10 if key == "arguments" else 0.2
            epochs = 5 + train.RANK if key == "epochs" else 5
            options = ["--precision", "fp32", "--dropout", dropout, "--epochs", epochs]
            try:
                go(place, encoder, cached, f"{out}/{train.RANK}", *options)
            except ValueError as error:
                found[key] = str(error)
    torch.save(found, f"{out}/of-{train.PROCESSES}-{train.RANK}.pt")
    if train.PROCESSES == 2:
        go(corpus, encoder, f"{out}/cache", f"{out}/whole-{train.RANK}", *RUN)
        # The same line again, while another run holds the folder, and finishes meanwhile.
        lock = cache.lock

        def lock_late(folder):
            time.sleep(0.5)  # The other process must not look into the folder before that.
            shutil.copytree(f"{out}/whole-0", folder)
            return lock(folder)

        cache.lock = lock_late
        go(corpus, encoder, f"{out}/cache", f"{out}/again", *RUN, "--resume")
        cache.lock = lock
        train_epoch = train.train_epoch

        def die(*args):
            if args[-1] == 2:
                train.exchange("the first process has saved epoch 1")
                if train.RANK == 1:
                    os.kill(os.getpid(), signal.SIGKILL)
            return train_epoch(*args)

        train.train_epoch = die
        with pytest.raises(ConnectionError, match="another process has ended; see its line"):
            go(corpus, encoder, f"{out}/cache", f"{out}/parts", *RUN)


def work_as(rank, n, *places):
    """In a child: `work` as process `rank` of n."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(n)}
    train.RANK = rank
    train.PROCESSES = n
    store = f"file://{places[-1]}/store-{n}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=n)
    work(*places)


@pytest.fixture(scope="module")
def out(corpus, encoder, cached, tmp_path_factory):
    """Folder of what `work` left of one, two and three processes. Of two, one is killed at last."""
    out = tmp_path_factory.mktemp("found")
    places = [f"{out}/corpus", encoder, cached(2), out]
    shutil.copytree(corpus, places[0])
    for rank in (0, 1, 2):  # the same but for the last one's first label
        shutil.copytree(corpus, f"{places[0]}-{rank}")
    labels = out / "corpus-1" / "Labels" / "labels_consensus.csv"
    first = read_csv(labels)[0]["EmoAct"]
    labels.write_text(labels.read_text().replace(first, "4", 1))
    for n in (3, 2):
        processes = [fork(work_as, rank, n, *places) for rank in range(n)]
        for process in processes:
            process.join()
        codes = [0, -signal.SIGKILL] if n == 2 else [0, 0, 0]
        assert [process.exitcode for process in processes] == codes
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "fit", train.fit)
        work(*places)
    return out


def read(out, n, rank=0):
    return torch.load(out / f"of-{n}-{rank}.pt", weights_only=True)


@pytest.mark.parametrize("n", [2, 3])
def test_the_same_step(n, out):
    """Dropout off, loss and gradients of every batch in every row, in both paddings, in chunks and
    recomputed, are those of one process: to 5e-6 of the largest in float32, 1e-12 in float64.
    Evaluated predictions are the same to the bit."""
    one, several = read(out, 1), read(out, n)
    cases = [name for name in one if "," in name]
    assert len(cases) == 2 * len(CASES)
    for name in cases:
        assert torch.equal(several[name]["evaluated"], one[name]["evaluated"])
        for dtype, bound in (("float32", 5e-6), ("float64", 1e-12)):
            alone, shared = one[name][dtype], several[name][dtype]
            assert relative(shared["loss"], alone["loss"]) < bound, name
            assert len(shared["steps"]) == len(alone["steps"]) == (4 if "a process" in name else 2)
            for found, expected in zip(shared["steps"], alone["steps"], strict=True):
                found, expected = (dict(enumerate(step)) for step in (found, expected))
                assert relative(found, expected) < bound, (name, dtype)


@pytest.mark.parametrize("n", [2, 3])
def test_processes_agree(n, out):
    """After an epoch with dropout, which each draws for itself, all processes have the same
    weights, and all evaluate to the same predictions, to the bit. Those that were started with
    different arguments or labels refuse to begin."""
    first, *others = (read(out, n, rank) for rank in range(n))
    for name in (name for name in first if "," in name):
        assert len({each[name]["seed"] for each in (first, *others)}) == n
        assert not torch.equal(first[name]["trained"][0], read(out, 1)[name]["trained"][0])
        for other in others:
            assert torch.equal(other[name]["evaluated"], first[name]["evaluated"])
            weights = zip(other[name]["trained"], first[name]["trained"], strict=True)
            assert all(torch.equal(*pair) for pair in weights)
    for each in (first, *others):
        errors = {each[key] for key in ("arguments", "labels", "epochs")}
        assert len(errors) == 1 and "processes differ in arguments" in errors.pop()


def test_killed_and_resumed(out, encoder, cached, launch):
    """Of two processes, only the first writes and prints. After SIGKILL of the second no result is
    there; another number of processes is refused; --resume by torchrun goes on and ends bitwise as
    undisturbed, and leaves no thread that could abort a process's end. The cache that both filled
    is what one fills. A run that another one finished meanwhile is left alone by both."""
    whole, parts = out / "whole-0", out / "parts"
    assert not (out / "whole-1").exists() and not (parts / "result.json").exists()
    assert relative(read_cache(out / "cache"), read_cache(cached(3, "float16"))) == 0
    assert {path.name[:8] for path in (out / "cache").glob("shard-*")} == {"shard-0-", "shard-1-"}
    line = [*COMMON, *(out / "cache" if option == "CACHE" else option for option in RUN)]
    line += ["--data", out / "corpus", "--resume"]
    with pytest.raises(ValueError, match="is of a run with processes 2, not 1"):
        launch(parts, *line)
    line = [*TORCHRUN, 2, out / "main.py", *line, "--model", encoder, "--out", parts]
    (out / "main.py").write_text(MAIN)
    # Another number of threads, which the user may have set, would round otherwise.
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    resumed = subprocess.run(map(str, line), capture_output=True, text=True, check=False, env=env)
    assert resumed.returncode == 0, resumed.stderr
    assert "epoch 1/2" not in resumed.stdout and resumed.stdout.count("epoch 2/2") == 1
    assert resumed.stdout.count("Test1 with epoch") == 1 == resumed.stdout.count("steps an epoch")
    assert state(parts) == state(whole) == state(out / "again")


def test_demo_of_several_processes_is_refused(monkeypatch):
    """The demo makes its own corpus, which several processes would do over each other."""
    monkeypatch.setattr(train, "PROCESSES", 2)
    with pytest.raises(ValueError, match="--demo runs in one process"):
        train.main(["--demo"])
