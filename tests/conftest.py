"""The scripts on the path, wherever pytest starts; a tiny corpus and encoder; what tests share."""

import csv
import json
import multiprocessing
import os
import re
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from threading import RLock
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import soundfile
import torch
import tqdm
import transformers

sys.path.insert(0, str(Path(__file__).parent.parent))

import cache
import data
import train

torch.set_num_threads(1)  # tiny tensors: a second thread costs more than it brings
# Children are forked from here, so a bar may have no thread of its own, and no lock in common.
tqdm.tqdm.monitor_interval = 0
tqdm.tqdm.set_lock(RLock())
FORK = multiprocessing.get_context("fork")
# Forked children cannot share a GPU either, and a GPU rounds otherwise. So it is hidden from all
# but the process of the fixture `gpu`. Counting GPUs does not start one.
NEEDS_GPU = pytest.mark.skipif(torch.cuda.device_count() == 0, reason="needs an NVIDIA GPU")
GPUS = os.environ.get("CUDA_VISIBLE_DEVICES", "0")
os.environ["CUDA_VISIBLE_DEVICES"] = ""
DEPTH, WIDTH = 4, 32  # of the tiny encoder


def tiny_config(kind="Wav2Vec2", **changes):
    """A wav2vec 2.0 of the base kind, or another, at toy size. Large random weights, so that every
    part shows in the output."""
    shape = {"hidden_size": WIDTH, "num_hidden_layers": DEPTH, "num_attention_heads": 4}
    shape |= {"intermediate_size": 64, "conv_dim": (16,) * 7, "num_conv_pos_embeddings": 16}
    shape |= {"num_conv_pos_embedding_groups": 4, "initializer_range": 0.2}
    config = getattr(transformers, f"{kind}Config")
    return config(**shape | {"feat_proj_dropout": 0.1} | changes)


def tiny_encoder(**changes):
    torch.manual_seed(1)
    encoder = transformers.AutoModel.from_config(tiny_config(**changes)).eval()
    for name, parameter in encoder.named_parameters():
        if name.endswith("gru_rel_pos_const"):  # WavLM's gate, ones at first
            torch.nn.init.uniform_(parameter, 0.5, 2)
    return encoder


def fork(target, *args):
    """A child process, a copy of this one, that calls target: it need not import all again."""
    process = FORK.Process(target=target, args=args)
    process.start()
    return process


def relative(actual, expected):
    """Largest difference, in units of the largest entry, of two tensors or {name: tensor}."""
    if isinstance(expected, torch.Tensor):
        actual, expected = {"": actual}, {"": expected}
    assert actual.keys() == expected.keys()
    difference = max((actual[name] - expected[name]).abs().max() for name in expected)
    return (difference / max(tensor.abs().max() for tensor in expected.values())).item()


def chunked(lengths, inputs, chunk=None):
    """A padded batch in chunks, short to long, for train.predict_batch, and places in the batch."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    rows = [order[i : i + (chunk or len(order))] for i in range(0, len(order), chunk or len(order))]
    chunks = [(inputs[r, : max(lengths[i] for i in r)], [lengths[i] for i in r]) for r in rows]
    return chunks, torch.tensor(order).argsort()


def step(model, batch, seed=0, chunk=None, cached=False, recompute=False, precision="fp32"):
    """{name: tensor} of predictions, loss and gradients of a step on (inputs, lengths, targets)."""
    args = SimpleNamespace(device="cpu", precision=precision, cached=cached, recompute=recompute)
    torch.manual_seed(seed)
    model.zero_grad()
    chunks, places = chunked(batch[1], batch[0], chunk)
    with train.autocast(args):
        predictions = train.predict_batch(model, chunks, args)[places]
    loss = train.ccc_loss(predictions, batch[2])
    loss.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"predictions": predictions.detach(), "loss": loss.detach(), **gradients}


def read_cache(folder):
    """{name: hidden states (T, D)} of all that a cache holds."""
    entries, _, _ = cache.read_entries(folder)
    utterances = [SimpleNamespace(name=name, labels=()) for name in entries]
    dataset = cache.CachedDataset(entries, utterances)
    return {name: dataset[i][0] for i, name in enumerate(entries)}


def read_shard(path):
    """{name: hidden states (T, D)} of a shard, and what it says of itself."""
    with safetensors.safe_open(path, "pt") as shard:
        tensors = {name: shard.get_tensor(name).clone() for name in shard.keys()}  # noqa: SIM118
        return tensors, json.loads(shard.metadata()["about"])


def write_shard(path, tensors, about):
    safetensors.torch.save_file(tensors, path, {"about": json.dumps(about)})


def state(folder):
    """All that a run holds, as text to compare bitwise; without times, memory and its folder."""
    last, best = (torch.load(Path(folder, f"{k}.pt"), weights_only=True) for k in ("last", "best"))
    text = json.dumps([last, best], default=torch.Tensor.tolist)
    for name in ("result.json", "metrics.jsonl", "predictions-Test1.csv"):
        text += Path(folder, name).read_text()
    apart = r'"(train_seconds|eval_seconds|fill_seconds|peak_memory_bytes|out)": [^,}]+'
    return re.sub(apart, "", text)


def tree(folder):
    """{path: bytes and time of its last change} of every file under a folder."""
    files = [path for path in sorted(Path(folder).rglob("*")) if path.is_file()]
    return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def read_csv(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """28 utterances of different lengths, 0.2 to 0.9 s: Train 12, Development 8, Test1 8."""
    root = tmp_path_factory.mktemp("corpus")
    data.write_demo(root, speakers=(("Train", 3, 4), ("Development", 2, 4), ("Test1", 2, 4)))
    for i, path in enumerate(sorted(root.glob("Audios/*.wav"))):
        wave, rate = soundfile.read(path)
        soundfile.write(path, np.resize(wave, 3500 + 397 * (13 * i % 28)), rate)
    return str(root)


@pytest.fixture(scope="session")
def encoder(tmp_path_factory):
    """Folder of the tiny encoder in the Hugging Face layout."""
    folder = tmp_path_factory.mktemp("encoder")
    tiny_encoder().save_pretrained(folder)
    transformers.Wav2Vec2FeatureExtractor(do_normalize=True).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def fill(corpus, encoder):
    """fill(folder, *options): cache.py on the tiny corpus."""

    def run(folder, *options):
        arguments = ["--data", corpus, "--model", encoder, "--out", folder]
        cache.main([str(argument) for argument in [*arguments, *options]])

    return run


@pytest.fixture(scope="session")
def cached(fill, tmp_path_factory):
    """cached(layers, dtype) -> a cache for the last `layers` layers, filled at the first call."""
    folders = {}

    def get(*key):
        if key not in folders:
            folders[key] = str(tmp_path_factory.mktemp("cache"))
            fill(folders[key], "--layers", key[0], "--dtype", (*key, "float32")[1])
        return folders[key]

    return get


@pytest.fixture(scope="module")
def gpu():
    """gpu(main, options): a script's main in a process of its own, which sees the GPU."""
    context = multiprocessing.get_context("spawn")
    visible = {"CUDA_VISIBLE_DEVICES": GPUS}
    with ProcessPoolExecutor(1, context, os.environ.update, [visible]) as pool:
        yield lambda main, options: pool.submit(main, [str(option) for option in options]).result()


@pytest.fixture(scope="session")
def launch(corpus, encoder):
    """launch(folder, *options): train.py on the tiny corpus, one epoch of three batches."""

    def run(folder, *options):
        arguments = ["--data", corpus, "--model", encoder, "--out", folder, "--epochs", 1]
        arguments += ["--batch-size", 4, "--workers", 1, "--device", "cpu", "--precision", "fp32"]
        train.main([str(argument) for argument in [*arguments, *options]])

    return run


@pytest.fixture
def prepare(launch, tmp_path_factory, monkeypatch):
    """prepare(*options) -> args, model, datasets as train.fit gets them, and the first batch."""
    made = []

    def instead_of_fit(args, model, datasets, config):
        rows = train.batches(datasets["Train"], args, 1)[0]
        batch = data.collate([datasets["Train"][i] for i in rows])
        made.append(SimpleNamespace(args=args, model=model, datasets=datasets, batch=batch))
        for name, parameter in model.named_parameters():
            if name.endswith("lora_b"):  # zero would keep any gradient from lora_a
                torch.nn.init.normal_(parameter, std=0.1)

    def run(*options):
        with monkeypatch.context() as patch:
            patch.setattr(train, "fit", instead_of_fit)
            launch(tmp_path_factory.mktemp("run"), "--padding", "exact", *options)
        return made[-1]

    return run
