"""A cached run against the uncached one with the same parts frozen; what is on disk; the refusal of
foreign caches."""

from pathlib import Path

import pytest
import torch
from conftest import DEPTH, WIDTH, relative, step, tiny_encoder

import cache
import data
import model as models
import train

every_method = pytest.mark.parametrize("method", ["partial", "lora"])


def after_a_step(made):
    """Predictions, loss and gradients of the first training step, dropout on, and predictions and
    weights after it."""
    model = made.model.train()
    first = step(model, made.batch, cached=made.args.cached)
    trained = models.trainable(model)
    torch.optim.AdamW(trained.values(), lr=1e-3).step()
    for name, parameter in trained.items():
        if not name.endswith("k_proj.bias"):  # attention cancels it: its gradient is rounding noise
            first[f"after {name}"] = parameter.detach().clone()
    second = step(model, made.batch, cached=made.args.cached)
    return first | {"predictions after": second["predictions"]}


@every_method
@pytest.mark.parametrize("layers", [1, 2, 3])
def test_cached_is_uncached(method, layers, prepare, cached):
    """In exact padding a training step from a float32 cache, dropout on, is that of the uncached
    run with the same frozen prefix: predictions, gradients, and the weights after the optimizer's
    step."""
    row = ["--method", method, "--layers", layers]
    uncached = prepare(*row, *(["--freeze-prefix"] if method == "partial" else []))
    from_cache = prepare(*row, "--cache", cached(DEPTH - layers))
    assert relative(after_a_step(from_cache), after_a_step(uncached)) < 1e-5


@every_method
@pytest.mark.parametrize("layers", [1, 2])
def test_an_early_cache_serves_fewer_layers(method, layers, prepare, cached):
    """A cache of layer 1 trains the last 1 or 2 of 4 layers as a cache at their own layer does;
    what lies between stays frozen, its dropout off."""
    row = ["--method", method, "--layers", layers]
    early, own = (prepare(*row, "--cache", cached(layer)) for layer in (1, DEPTH - layers))
    assert (early.model.cut, own.model.cut) == (1, DEPTH - layers)
    assert relative(after_a_step(early), after_a_step(own)) < 1e-5


def test_a_late_cache_is_refused(launch, cached, tmp_path, capsys):
    """A cache that starts after the first layer to be trained is refused."""
    with pytest.raises(SystemExit) as exit:
        launch(tmp_path / "run", "--layers", 2, "--cache", cached(3))
    assert exit.value.code == 2 and "starts at layer 3" in capsys.readouterr().err


def test_float16_cache(prepare, cached):
    """A float16 cache moves predictions by less than 1e-3 and gradients by less than 1e-2 of the
    largest (measured on tiny random encoders: up to 1e-4 and 1.2e-3)."""
    rows = (prepare("--layers", 3, "--cache", cached(1, dtype)) for dtype in ("float16", "float32"))
    half, single = (step(made.model.eval(), made.batch, cached=True) for made in rows)
    assert 0 < relative(half.pop("predictions"), single.pop("predictions")) < 1e-3
    assert relative(half, single) < 1e-2


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "bytes_a_value"), [("float16", 2), ("float32", 4)])
def test_what_is_stored(dtype, bytes_a_value, corpus, encoder, cached):
    """An utterance is stored as Hugging Face's hidden states before the layer, of that waveform
    alone, in 2 D bytes a true frame (float16; 4 D in float32), and a shard holds nothing else."""
    folder = Path(cached(1, dtype))
    index, total = cache.read_index(folder), 0
    hf = models.load_encoder(encoder)[0].eval()
    for u in data.read_corpus(corpus)[0]:
        hidden = cache.read_utterance(folder, index, u.name)
        wave = torch.from_numpy(data.normalise(data.load_audio(u.path)))[None]
        expected = hf(wave, output_hidden_states=True).hidden_states[1][0]
        assert hidden.shape == expected.shape and hidden.shape[1] == WIDTH
        assert hidden.nbytes == len(expected) * WIDTH * bytes_a_value
        assert relative(hidden.float(), expected) < (1e-3 if dtype == "float16" else 1e-5)
        total += hidden.nbytes
    assert total <= sum(path.stat().st_size for path in folder.glob("shard-*")) < total + 4096


gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


@pytest.mark.parametrize(
    ("device", "tolerance"), [("cpu", 1e-6), pytest.param("cuda", 1e-2, marks=gpu)]
)
def test_batched_fill(device, tolerance, fill, cached, tmp_path):
    """Filling 8 utterances a pass or one at a time stores the same, to 1e-6; a GPU, where PyTorch
    runs convolutions in TF32, stores what the CPU does to 1e-2."""
    fill(tmp_path, "--layer", 1, "--dtype", "float32", "--batch-size", 1, "--device", device)
    folders = (cached(1), tmp_path)
    batched, single = (
        {name: cache.read_utterance(folder, index, name) for name in index["utterances"]}
        for folder, index in zip(folders, map(cache.read_index, folders), strict=True)
    )
    assert len(single) == 28 and relative(batched, single) < tolerance


def test_negative_layer(fill, cached, tmp_path):
    """--layer -3 is the third last layer: fingerprint and bytes of --layer 1 of 4."""
    fill(tmp_path, "--layer", -3, "--dtype", "float32")
    negative, positive = cache.read_index(tmp_path), cache.read_index(cached(1))
    assert negative["fingerprint"] == positive["fingerprint"]
    assert negative["shards"] == positive["shards"]


def test_a_fill_continues(fill, tmp_path, capsys):
    """The same command with more splits adds what is missing and leaves what is there; --verify
    finds all intact."""
    fill(tmp_path, "--layer", 1, "--splits", "Train")
    before = cache.read_index(tmp_path)
    fill(tmp_path, "--layer", 1)
    after = cache.read_index(tmp_path)
    assert (len(before["utterances"]), len(after["utterances"])) == (12, 28)
    for part in ("utterances", "shards"):
        assert before[part].items() <= after[part].items()
    fill(tmp_path, "--layer", 1, "--verify")
    assert "all 28 utterances are intact" in capsys.readouterr().out


OTHER = {"encoder": "0" * 64, "layer": 2, "dtype": "float32", "sample_rate": 8000}
OTHER |= {"normalise": False, "padding": "paper"}


@pytest.mark.parametrize("key", OTHER)
def test_a_foreign_cache_is_refused(key, cached):
    """A cache made with another value of any part of the fingerprint is refused, naming both
    values."""
    index = cache.read_index(cached(1, "float16"))
    found = index["fingerprint"]
    assert found.keys() == OTHER.keys()
    cache.compare("here", index, dict(found))
    with pytest.raises(ValueError, match=f"another {key} {found[key]}, not {OTHER[key]}"):
        cache.compare("here", index, found | {key: OTHER[key]})


def test_weights_make_the_fingerprint(encoder):
    """The same folder gives the same hash; one changed weight another."""
    (first, _), (second, _) = (models.load_encoder(encoder) for _ in range(2))
    assert models.weights_hash(first) == models.weights_hash(second)
    second.encoder.layers[3].final_layer_norm.bias.data[0] += 1e-6
    assert models.weights_hash(first) != models.weights_hash(second)


def test_equal_frames_draw_the_same_dropout():
    """Utterances of different samples and equal frames go through the model in the same order
    cached and uncached, so with one seed dropout falls alike."""
    model = models.EmotionModel(tiny_encoder(), padding="exact")
    models.freeze(model.train(), "partial", 2, freeze_prefix=True)
    samples = torch.tensor([5100, 5000, 9000])
    wave = torch.randn(3, 9000) * (torch.arange(9000) < samples[:, None])
    hidden, frames = model.train().frozen(wave, samples)
    assert frames[0] == frames[1]
    torch.manual_seed(0)
    uncached = train.predict(model, wave, samples, "cpu")
    torch.manual_seed(0)
    assert relative(train.predict(model, hidden, frames, "cpu", cached=True), uncached) < 1e-5
