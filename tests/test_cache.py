"""A cached run against the uncached one with the same parts frozen; what is on disk; the refusal of
foreign caches."""

import json
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import DEPTH, WIDTH, read_cache, relative, step, tiny_encoder

import cache
import data
import model as models
import train

FLOAT32 = ("--layers", 3, "--dtype", "float32")


def after_a_step(made):
    """Predictions, loss and gradients of the first training step, dropout on, and predictions after
    it."""
    model = made.model.train()
    first = step(model, made.batch, cached=made.args.cached)
    torch.optim.AdamW(models.trainable(model).values(), lr=1e-3).step()
    second = step(model, made.batch, cached=made.args.cached)
    return first | {"predictions after": second["predictions"]}


@pytest.mark.parametrize("method", ["partial", "lora"])
@pytest.mark.parametrize(("layers", "filled"), [(1, 1), (2, 2), (3, 3), (1, 3), (2, 3)])
def test_cached_is_uncached(layers, filled, method, prepare, cached):
    """In exact padding, dropout on, a training step from a float32 cache, even one for more layers,
    is that of the uncached run with the same frozen prefix: predictions, gradients, and predictions
    after the optimizer's step."""
    row = ["--method", method, "--layers", layers]
    uncached = prepare(*row, *(["--freeze-prefix"] if method == "partial" else []))
    from_cache = prepare(*row, "--cache", cached(filled))
    assert (uncached.model.cut, from_cache.model.cut) == (DEPTH - layers, DEPTH - filled)
    assert relative(after_a_step(from_cache), after_a_step(uncached)) < 1e-5


def test_a_late_cache_is_refused(launch, cached, tmp_path):
    """A cache that starts after the first trained layer is refused, and nothing is written."""
    with pytest.raises(ValueError, match="--layers 2"):
        launch(tmp_path / "run", "--layers", 2, "--cache", cached(1))
    assert not (tmp_path / "run").exists()


def test_float16_cache(prepare, cached):
    """A float16 cache moves predictions by less than 1e-3 and gradients by less than 1e-2 of the
    largest (measured on tiny random encoders: up to 1e-4 and 1.2e-3)."""
    rows = (prepare("--layers", 3, "--cache", cached(3, dtype)) for dtype in ("float16", "float32"))
    half, single = (step(made.model.eval(), made.batch, cached=True) for made in rows)
    assert 0 < relative(half.pop("predictions"), single.pop("predictions")) < 1e-3
    assert relative(half, single) < 1e-2


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "bytes_a_value"), [("float16", 2), ("float32", 4)])
def test_what_is_stored(dtype, bytes_a_value, corpus, encoder, cached):
    """An utterance is stored as Hugging Face's hidden states before the layer, of that waveform
    alone, in 2 D bytes a true frame (float16; 4 D in float32), and a shard holds nothing else."""
    folder, total = Path(cached(3, dtype)), 0
    hf, stored = models.load_encoder(encoder)[0].eval(), read_cache(folder, corpus)
    dataset = data.SpeechDataset(data.read_corpus(corpus)[0])
    for u, (wave, _) in zip(dataset.utterances, dataset, strict=False):
        hidden, wave = stored[u.name], wave[None]
        expected = hf(wave, output_hidden_states=True).hidden_states[1][0]
        assert hidden.shape == expected.shape and hidden.shape[1] == WIDTH
        assert hidden.nbytes == len(expected) * WIDTH * bytes_a_value
        assert relative(hidden.float(), expected) < (1e-3 if dtype == "float16" else 1e-5)
        total += hidden.nbytes
    assert total <= sum(path.stat().st_size for path in folder.glob("shard-*")) < total + 4096


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_a_gpu_fills_the_same(fill, cached, corpus, tmp_path, monkeypatch):
    """A GPU, where PyTorch runs convolutions in TF32, stores what the CPU does to 1e-2."""
    fill(tmp_path, *FLOAT32)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    cpu, gpu = (read_cache(folder, corpus) for folder in (cached(3), tmp_path))
    assert relative(gpu, cpu) < 1e-2


def test_a_fill_continues(fill, tmp_path, capsys):
    """The same command with more splits adds what is missing and leaves what is there; --verify
    finds all intact."""
    fill(tmp_path, "--layers", 3, "--splits", "Train")
    before, shard = cache.read_index(tmp_path, {}), (tmp_path / "shard-00000.pt").read_bytes()
    fill(tmp_path, "--layers", 3)
    after = cache.read_index(tmp_path, {})
    assert (len(before["utterances"]), len(after["utterances"])) == (12, 28)
    assert before["utterances"].items() <= after["utterances"].items()
    assert (tmp_path / "shard-00000.pt").read_bytes() == shard
    fill(tmp_path, "--layers", 3, "--verify")
    assert "all 28 utterances are intact" in capsys.readouterr().out


def test_processes_fill_side_by_side(fill, cached, corpus, tmp_path, monkeypatch):
    """Two of three processes, the last of which dies, write files of their own that readers merge.
    One more, though a shard of the first is lost, completes the cache that one alone makes."""
    monkeypatch.setattr(cache, "SHARD_BYTES", 20_000)
    monkeypatch.setenv("WORLD_SIZE", "3")
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        fill(tmp_path, *FLOAT32)
    assert {path.name for path in tmp_path.glob("index*")} == {"index.json", "index-1.json"}
    assert len(read_cache(tmp_path, corpus)) == 28 - len(range(2, 28, 3))
    (tmp_path / "shard-00000.pt").unlink()
    monkeypatch.delenv("RANK")
    monkeypatch.delenv("WORLD_SIZE")
    fill(tmp_path, *FLOAT32, "--splits", "Test1")  # a new shard of the lost one's name
    fill(tmp_path, *FLOAT32)
    assert relative(read_cache(tmp_path, corpus), read_cache(cached(3), corpus)) == 0


OTHER = {"encoder": "0" * 64, "layer": 2, "dtype": "float32", "sample_rate": 8000}
OTHER |= {"normalise": False}


@pytest.mark.parametrize("key", OTHER)
def test_a_foreign_cache_is_refused(key, cached):
    """A cache made with another value of any part of the fingerprint is refused, naming both."""
    folder = cached(3, "float16")
    found = cache.read_index(folder, {})["fingerprint"]
    assert found.keys() == OTHER.keys() and cache.read_index(folder, found)
    with pytest.raises(ValueError, match=f"another {key} {found[key]}, not {OTHER[key]}"):
        cache.read_index(folder, found | {key: OTHER[key]})


def test_the_checksum_covers_what_is_claimed(fill, corpus, tmp_path):
    """An index that claims another layer, offset or name than was written is found at reading."""
    fill(tmp_path, "--layers", 3)
    index = json.loads((tmp_path / "index.json").read_text())
    fingerprint, entries = index["fingerprint"], index["utterances"]
    (one, a), (two, b) = list(entries.items())[:2]
    for claim in (
        {"fingerprint": fingerprint | {"layer": 2}},
        {"utterances": entries | {one: [a[0], a[1] + 1, *a[2:]]}},
        {"utterances": entries | {one: b[:4] + a[4:], two: a[:4] + b[4:]}},
    ):
        (tmp_path / "index.json").write_text(json.dumps(index | claim))
        with pytest.raises(ValueError, match=f"shard-00000.pt is damaged .* {one}"):
            read_cache(tmp_path, corpus)


def test_writing_does_not_wait(corpus, tmp_path, monkeypatch):
    """The model goes on with the next shard while one is written."""
    monkeypatch.setattr(cache, "SHARD_BYTES", 1)
    events, add_shard = [], cache.add_shard
    going = threading.Event()

    def slow(*args):
        assert going.wait(10)
        add_shard(*args)
        events.append("written")

    def encode(utterances):
        yield torch.ones(3, 4)
        events.append("second")
        going.set()
        yield torch.ones(2, 4)

    monkeypatch.setattr(cache, "add_shard", slow)
    index = {"fingerprint": {"dtype": "float32"}, "seconds": 0.0, "utterances": {}}
    cache.fill(tmp_path, index, data.read_corpus(corpus)[0][:2], encode)
    assert events == ["second", "written", "written"]


def test_equal_frames_draw_the_same_dropout():
    """Utterances of different samples and equal frames go through the model in the same order
    cached and uncached, so with one seed dropout falls alike."""
    model = models.EmotionModel(tiny_encoder(), padding="exact")
    models.freeze(model, "partial", 2, freeze_prefix=True)
    samples = [5100, 5000, 9000, 8990]
    args = SimpleNamespace(batch_size=4, seed=0, padding="exact", chunk=2, cached=False)
    orders = []
    for args.cached in (False, True):
        lengths = [model.frames(n) for n in samples] if args.cached else samples
        dataset = type("Lengths", (list,), {"lengths": lengths})(range(4))
        orders.append([train.make_batches(dataset, model, args, epoch) for epoch in range(1, 9)])
    assert orders[0] == orders[1] and model.frames(5100) == model.frames(5000)
