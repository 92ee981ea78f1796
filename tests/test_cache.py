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

every_method = pytest.mark.parametrize("method", ["partial", "lora"])


def after_a_step(made):
    """Predictions, loss and gradients of the first training step, dropout on, and predictions after
    it."""
    model = made.model.train()
    first = step(model, made.batch, cached=made.args.cached)
    torch.optim.AdamW(models.trainable(model).values(), lr=1e-3).step()
    second = step(model, made.batch, cached=made.args.cached)
    return first | {"predictions after": second["predictions"]}


@every_method
@pytest.mark.parametrize("layers", [1, 2, 3])
def test_cached_is_uncached(method, layers, prepare, cached):
    """In exact padding a training step from a float32 cache, dropout on, is that of the uncached
    run with the same frozen prefix: predictions, gradients, and predictions after the
    optimizer's step."""
    row = ["--method", method, "--layers", layers]
    uncached = prepare(*row, *(["--freeze-prefix"] if method == "partial" else []))
    from_cache = prepare(*row, "--cache", cached(layers))
    assert relative(after_a_step(from_cache), after_a_step(uncached)) < 1e-5


@every_method
@pytest.mark.parametrize("layers", [1, 2])
def test_an_early_cache_serves_fewer_layers(method, layers, prepare, cached):
    """A cache for the last 3 of 4 layers trains the last 1 or 2 as a cache of their own does; what
    lies between stays frozen, its dropout off."""
    row = ["--method", method, "--layers", layers]
    early, own = (prepare(*row, "--cache", cached(n)) for n in (3, layers))
    assert (early.model.cut, own.model.cut) == (1, DEPTH - layers)
    assert relative(after_a_step(early), after_a_step(own)) < 1e-5


def test_a_late_cache_is_refused(launch, cached, tmp_path):
    """A cache that starts after the first layer to be trained is refused, and nothing is written."""
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
    fill(tmp_path, "--layers", 3, "--dtype", "float32")
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


@pytest.mark.parametrize("first", [2, 3])
def test_processes_fill_side_by_side(first, fill, cached, corpus, tmp_path, monkeypatch):
    """Two or three processes, the last of which dies, and then one, make the cache that one makes:
    each writes files of its own, and readers merge them."""
    monkeypatch.setattr(cache, "SHARD_BYTES", 20_000)
    monkeypatch.setenv("WORLD_SIZE", str(first))
    for rank in range(first - 1):
        monkeypatch.setenv("RANK", str(rank))
        fill(tmp_path, "--layers", 3, "--dtype", "float32")
    assert len(read_cache(tmp_path, corpus)) == 28 - len(range(first - 1, 28, first))
    assert {path.name for path in tmp_path.glob("index*")} == {
        f"index{'-' * (rank > 0)}{rank or ''}.json" for rank in range(first - 1)
    }
    monkeypatch.delenv("RANK")
    monkeypatch.delenv("WORLD_SIZE")
    fill(tmp_path, "--layers", 3, "--dtype", "float32")
    merged, alone = (read_cache(folder, corpus) for folder in (tmp_path, cached(3)))
    assert merged.keys() == alone.keys()
    assert all(torch.equal(merged[name], alone[name]) for name in alone)
    fill(tmp_path, "--layers", 3, "--dtype", "float32", "--verify")


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
    text = (tmp_path / "index.json").read_text()
    one, two = list(json.loads(text)["utterances"])[:2]

    def swap(index):
        a, b = index["utterances"][one], index["utterances"][two]
        a[:4], b[:4] = b[:4], a[:4]

    def move(index):
        index["utterances"][one][1] += 1

    def claim(index):
        index["fingerprint"]["layer"] = 2

    for change in (swap, move, claim):
        change(index := json.loads(text))
        (tmp_path / "index.json").write_text(json.dumps(index))
        with pytest.raises(ValueError, match=f"shard-00000.pt is damaged .* {one}"):
            read_cache(tmp_path, corpus)


def test_writing_does_not_wait(monkeypatch, tmp_path):
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
    utterances = []
    for name in "ab":
        (tmp_path / name).write_bytes(b"")
        utterances.append(data.Utterance(name, str(tmp_path / name), "Train", "1", ()))
    index = {"fingerprint": {"dtype": "float32"}, "seconds": 0.0, "utterances": {}}
    cache.fill(tmp_path, index, utterances, encode)
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


def test_a_shard_of_another_process_is_filled_again(fill, cached, corpus, tmp_path, monkeypatch):
    """A deleted shard of the second process comes back, whoever fills it, and nothing stale is read:
    each index lists its own process's shards only."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in (0, 1, 0):
        monkeypatch.setenv("RANK", str(rank))
        fill(tmp_path, "--layers", 3, "--dtype", "float32")
    (tmp_path / "shard-1-00000.pt").unlink()
    entries = json.loads((tmp_path / "index.json").read_text())["utterances"].values()
    assert {shard for shard, *_ in entries} == {"shard-00000.pt"}
    monkeypatch.setenv("RANK", "1")
    fill(tmp_path, "--layers", 3, "--dtype", "float32", "--splits", "Test1")
    fill(tmp_path, "--layers", 3, "--dtype", "float32")
    merged, alone = (read_cache(folder, corpus) for folder in (tmp_path, cached(3)))
    assert merged.keys() == alone.keys()
    assert all(torch.equal(merged[name], alone[name]) for name in alone)
