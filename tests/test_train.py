"""The loop: exact batches in any memory, every row of Table I end to end, resuming to the bit."""

import json
import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from conftest import DEPTH, NEEDS_GPU, read_csv, read_shard, relative, state, tiny_encoder, tree

import cache
import ccc
import data
import model as models
import train

ROWS = {
    "full": ["--method", "full"],
    "partial": ["--layers", 2],
    "embedding frozen": ["--layers", 2, "--freeze-embedding"],
    "lora": ["--method", "lora"],
    "partial cached": ["--layers", 2],
    "lora cached": ["--method", "lora", "--layers", 2],
}
CACHED = {"partial cached": 3, "lora cached": 2}  # of a cache of more layers, and of as many
FILES = "config.json metrics.jsonl last.pt best.pt predictions-{}.csv result.json .lock"
# What config.json holds beside the arguments, result.json beside config.json, a line of metrics.
CONFIG = """cached cache cache_contents corpus labels audio encoder_sha256 processes device versions
    trainable_parameters total_parameters device_memory_bytes"""
SPENT = {"train_seconds", "eval_seconds", "peak_memory_bytes"}
RESULT = {"best_epoch", "dev", "test", "fill_seconds", "out_of_memory"} | SPENT
JSON = "config", "result"
THREE = ["--precision", "fp16", "--lr", 1e-3, "--epochs", 3, "--seed", 1]
every_row = pytest.mark.parametrize("name", ROWS)
both_paddings = pytest.mark.parametrize("padding", ["paper", "exact"])


@pytest.fixture
def row(cached):
    """row(name) -> options of train.py for that row."""

    def options(name):
        return [*ROWS[name], *(["--cache", cached(CACHED[name])] if name in CACHED else [])]

    return options


def step(made, rows, chunk=None, recompute=False, seed=0):
    """{name: tensor} of predictions, loss and gradients of a step, and its chunks."""
    made.args.chunk = chunk
    made.args.recompute = recompute
    dataset = made.datasets["Train"]
    _, chunks = train.load_chunks(dataset, made.args, 0, 1, rows)
    torch.manual_seed(seed)
    made.model.zero_grad()
    predictions = train.predict_batch(made.model, chunks, made.args)
    loss = (1 - ccc.ccc(predictions, dataset.targets[rows])).mean()
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in models.trainable(made.model).items()}
    return gradients | {"predictions": predictions.detach(), "loss": loss.detach()}, chunks


@both_paddings
@every_row
def test_chunks_and_recompute(name, padding, row, prepare):
    """Dropout off, any chunk size gives the whole batch's predictions, loss and gradients, and
    those predictions are the model's of the zero-padded batch. Dropout on, recomputing changes no
    bit. A chunk is padded to its longest, in paper padding to the batch's."""
    made = prepare(*row(name), "--padding", padding, "--batch-size", 7)
    rows = train.batches(made.datasets["Train"], made.args, 1)[0]
    inputs, lengths, _ = made.batch
    assert lengths == sorted(set(lengths)) and len(lengths) == 7
    made.model.eval()
    whole, _ = step(made, rows)
    direct = (made.model.suffix if made.args.cached else made.model)(inputs, lengths)
    assert relative(whole["predictions"], direct.detach()) < 1e-6
    for chunk in (1, 3, 100):
        found, chunks = step(made, rows, chunk)
        assert relative(found, whole) < 1e-5
        assert [n for _, part in chunks for n in part] == lengths and len(chunks) == -(-7 // chunk)
        for padded, part in chunks:
            assert padded.shape[1] == max(lengths if padding == "paper" else part)
            assert not any(line[n:].any() for line, n in zip(padded, part, strict=True))
    made.model.train()
    for chunk in (None, 3):
        plain, recomputed = (step(made, rows, chunk, again)[0] for again in (False, True))
        assert not torch.equal(step(made, rows, chunk, seed=1)[0]["loss"], plain["loss"])
        assert all(torch.equal(recomputed[key], plain[key]) for key in plain)


def test_recompute_keeps_nothing(prepare):
    """With --recompute a forward pass keeps less than a hundredth for the backward pass."""
    made = prepare("--method", "full")
    kept = []
    for made.args.recompute in (False, True):
        tensors = []
        with torch.autograd.graph.saved_tensors_hooks(tensors.append, id):
            train.predict_batch(made.model, [made.batch[:2]], made.args)
        kept.append(sum(tensor.nbytes for tensor in tensors))
    assert 0 < kept[1] < kept[0] / 100


def test_batches(monkeypatch):
    """An epoch's order depends on seed and epoch alone, holds each utterance once, and has no batch
    of fewer than two or than processes. A batch goes from short to long by frames, ties by index,
    so it is the same from a cache. Evaluation keeps all, in paper padding in corpus order."""
    frames = [5, 4, 4, 9, 2, 4, 7, 7, 1, 3, 4, 6, 8]
    dataset = type("Lengths", (list,), {"frames": frames})(frames)

    def order(epoch=None, seed=0, batch_size=4, padding="paper"):
        sizes = {"batch_size": batch_size, "eval_batch_size": 5}
        args = SimpleNamespace(seed=seed, padding=padding, **sizes)
        return train.batches(dataset, args, epoch)

    assert order(1) == order(1)
    assert len({str(order(epoch, seed)) for epoch in (1, 2, 3) for seed in (0, 1)}) == 6
    assert sorted(i for rows in order(1, batch_size=11) for i in rows) == list(range(13))
    assert [len(rows) for rows in order(1)] == [4, 4, 4]  # and one is left over
    for rows in order(1) + order():
        assert rows == sorted(rows, key=lambda i: (frames[i], i))
    assert [sorted(rows) for rows in order()] == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9], [10, 11, 12]]
    short = sorted(range(13), key=lambda i: (frames[i], i))
    assert [i for rows in order(padding="exact") for i in rows] == short
    monkeypatch.setattr(train, "PROCESSES", 3)
    assert [len(rows) for rows in order(1, batch_size=11)] == [11]
    assert len(order()) == 3


@torch.no_grad()
@both_paddings
@pytest.mark.parametrize("name", ["full", "partial cached"])
def test_evaluation(name, padding, row, prepare):
    """In paper padding a prediction is the model's in a batch of --eval-batch-size in corpus order,
    and not what it is alone; in exact padding it is that, for any size. Predictions are in corpus
    order, CCCs are over all of them, chunks change nothing, and NaN is an error."""
    made = prepare(*row(name), "--padding", padding, "--eval-batch-size", 3)
    dataset = made.datasets["Test1"]
    model = made.model.eval().suffix if made.args.cached else made.model.eval()
    expected = {}
    for size in (1, 3, 4):
        parts = [range(8)[k : k + size] for k in range(0, 8, size)]
        batches = [data.collate([dataset[i] for i in part]) for part in parts]
        expected[size] = torch.cat([model(*batch[:2]) for batch in batches])
    assert (relative(expected[1], expected[3]) < 1e-5) == (padding == "exact")
    assert (relative(expected[4], expected[3]) < 1e-5) == (padding == "exact")
    for made.args.chunk in (None, 2):
        predictions, scores = train.evaluate(made.model, dataset, made.args)
        assert relative(predictions, expected[3]) < 1e-5
        assert [*scores.values()] == pytest.approx(lin(expected[3], dataset.targets), abs=1e-4)
    made.model.head.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="a prediction in evaluation is NaN"):
        train.evaluate(made.model, dataset, made.args)


def lin(pred, target):
    """Lin's CCC of each column, by NumPy."""
    found = []
    for x, y in zip(np.asarray(pred, float).T, np.asarray(target, float).T, strict=True):
        variances = np.var(x) + np.var(y)
        found.append(2 * np.cov(x, y, ddof=0)[0, 1] / (variances + (x.mean() - y.mean()) ** 2))
    return found


LORA = {"method": "lora", "layers": 2, "rank": 4, "alpha": 2, "lora_dropout": 0.3}
LORA_OPTIONS = ["--method", "lora", "--layers", 2, "--rank", 4, "--alpha", 2, "--lora-dropout", 0.3]
LOOPS = {
    "fp32": (["--layers", 2, "--chunk", 3], {"method": "partial", "layers": 2}, "exact"),
    "bf16": (["--method", "full"], {"method": "full"}, "paper"),
    "fp16": (LORA_OPTIONS, LORA, "paper"),
}


@pytest.mark.parametrize("precision", LOOPS)
def test_two_epochs(precision, corpus, encoder, launch, tmp_path):
    """Two epochs are this loop, to the bit: in train mode a step of AdamW on 1 - CCC for each batch
    of seeded order, under autocast and with float16's scaler, dropout seeded by seed and epoch;
    then an evaluation under autocast. The options decide what they say."""
    options, row, padding = LOOPS[precision]
    options = [*options, "--precision", precision, "--padding", padding, "--dropout", 0.4]
    options += ["--lr", 3e-3, "--seed", 3, "--epochs", 2, "--eval-batch-size", 3]
    launch(tmp_path, *options)
    torch.manual_seed(3)
    loaded, audio = models.load_encoder(encoder)
    model = models.EmotionModel(loaded, dropout=0.4, padding=padding, **audio)
    models.freeze(model, **row)
    trained = models.trainable(model)
    optimizer = torch.optim.AdamW(trained.values(), lr=3e-3, fused=True)
    scaler = torch.amp.GradScaler("cpu", enabled=precision == "fp16")
    dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]
    half = torch.autocast("cpu", dtype, precision != "fp32")
    utterances = data.usable(data.read_corpus(corpus, splits=["Train", "Development"]))
    training, dev = (
        data.SpeechDataset([u for u in utterances if u.split == split])
        for split in ("Train", "Development")
    )

    def batch(dataset, rows):
        return data.collate(sorted([dataset[i] for i in rows], key=lambda item: len(item[0])))

    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        model.train()
        rows = torch.randperm(12, generator=torch.Generator().manual_seed(3000 + line["epoch"]))
        torch.manual_seed(3_000_000 + 1000 * line["epoch"])
        losses = []
        for k in (0, 4, 8):
            wave, lengths, targets = batch(training, rows[k : k + 4].tolist())
            pieces = [wave] if padding == "paper" else [wave[:3, : lengths[2]], wave[3:]]  # chunks
            with half:
                parts = zip(pieces, torch.tensor(lengths).split(len(pieces[0])), strict=True)
                predictions = torch.cat([model(part, n.tolist()) for part, n in parts])
            loss = (1 - ccc.ccc(predictions, targets)).mean()
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            losses.append(loss.item())
        assert line["loss"] == pytest.approx(np.mean(losses), rel=1e-12)
        assert line["steps"] == optimizer.state[model.head.bias]["step"]
        model.eval()
        order = sorted(range(8), key=lambda i: len(dev[i][0]) * (padding == "exact"))
        parts = [batch(dev, order[k : k + 3]) for k in (0, 3, 6)]
        with half, torch.no_grad():
            predictions = torch.cat([model(wave, lengths) for wave, lengths, _ in parts])
        expected = lin(predictions, torch.cat([targets for _, _, targets in parts]))
        assert [*line["dev"].values()] == pytest.approx(expected, abs=1e-5)
    saved = torch.load(tmp_path / "last.pt", weights_only=True)
    assert len(lines) == 2 and saved["weights"].keys() == trained.keys()
    assert all(torch.equal(saved["weights"][name], p) for name, p in trained.items())
    assert (
        saved["scaler"] == scaler.state_dict() and len(saved["scaler"]) == 5 * scaler.is_enabled()
    )


def check_run(folder, epochs=1):
    """A run folder has every file and key, and agrees with its predictions -> result.json"""
    config, result = (json.loads((folder / f"{f}.json").read_text()) for f in JSON)
    split = result["splits"][2]
    assert {path.name for path in folder.iterdir()} == set(FILES.format(split).split())
    arguments = vars(train.parse_args(["--data", "x", "--out", "x"])).keys()
    assert config.keys() >= {*CONFIG.split(), *arguments} - {"resume"}
    assert result.keys() == config.keys() | RESULT and not result["out_of_memory"]
    assert all(result[key] == config[key] for key in config)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert all(line.keys() == {"epoch", "steps", "loss", "dev"} | SPENT for line in lines)
    assert [line["epoch"] for line in lines] == [*range(1, epochs + 1)]
    assert lines[result["best_epoch"] - 1]["dev"] == result["dev"]
    for key in SPENT:
        unite = max if key == "peak_memory_bytes" else sum
        assert result[key] == pytest.approx(unite(line[key] for line in lines)) and result[key] > 0
    saved = torch.load(folder / "best.pt", weights_only=True)
    assert saved["epoch"] == result["best_epoch"]
    assert saved["settings"].items() <= config.items() and "epochs" not in saved["settings"]
    assert result["trainable_parameters"] == sum(w.numel() for w in saved["weights"].values())
    rows = read_csv(folder / f"predictions-{split}.csv")
    columns = [data.ATTRIBUTES[attribute] for attribute in result["attributes"]]
    assert list(rows[0]) == ["FileName", *columns, *("Emo" + column for column in columns)]
    cells = [[float(cell) for cell in list(row.values())[1:]] for row in rows]
    expected = [*lin(*np.split(np.array(cells), 2, axis=1)), len(rows)]
    assert [*result["test"].values()] == pytest.approx(expected, abs=1e-5)
    assert list(result["test"]) == [*result["attributes"], "n"]
    return result


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=NEEDS_GPU)])
@every_row
def test_every_row(name, device, row, corpus, encoder, tmp_path, gpu):
    """Every row of Table I trains and writes its whole run folder, consistent in itself; by default
    on a GPU in float16 with its scaler, in chunks and recomputed, too."""
    line = ["--data", corpus, "--model", encoder, "--batch-size", 4, "--epochs", 1, *row(name)]
    line += ["--device", device, "--seed", 3]
    run = gpu if device == "cuda" else lambda main, options: main([str(x) for x in options])
    for more in [[], ["--padding", "exact", "--chunk", 2, "--recompute"]][: 1 + (device == "cuda")]:
        folder = tmp_path / f"run{len(more)}"
        run(train.main, [*line, *more, "--out", folder])
        result = check_run(folder)
        assert (result["seed"], result["test"]["n"], result["processes"]) == (3, 8, 1)
        assert result["method"] == name.replace("embedding", "partial").split()[0]
        assert result["layers"] == (DEPTH if name in ("full", "lora") else 2)
        assert result["cached"] == ("cached" in name) == (result["audio"] is None)
        assert result["cache"] == (f"cut {5 - CACHED[name]}, float32" if name in CACHED else None)
        assert result["freeze_embedding"] == ("cached" in name or name == "embedding frozen")
        uncached = {result[key] is None for key in ("cache_contents", "fill_seconds", "cache")}
        assert uncached == {"cached" not in name}
        scaler = torch.load(folder / "last.pt", weights_only=True)["scaler"]
        precision, _ = train.choose_precision(device)
        assert result["precision"] == precision and bool(scaler) == (precision == "fp16")
        assert result["device"].startswith("CPU") == (device == "cpu")


def test_best_epoch(launch, tmp_path, monkeypatch):
    """The test split is scored once, with the weights of the epoch whose mean Development CCC is
    highest, the first of equals; neither one attribute nor the last epoch decides."""
    scripted = iter([(0.6, 0.1), (0.3, 0.5), (0.2, 0.6), (0.7, 0.0)])
    calls = []
    evaluate = train.evaluate

    def with_script(model, *args):
        predictions, scores = evaluate(model, *args)
        calls.append({name: p.detach().clone() for name, p in models.trainable(model).items()})
        return predictions, dict(zip(scores, next(scripted, scores.values()), strict=True))

    monkeypatch.setattr(train, "evaluate", with_script)
    launch(tmp_path, "--epochs", 4, "--lr", 0.01)
    result = check_run(tmp_path, 4)
    assert (result["best_epoch"], result["dev"]) == (2, {"activation": 0.3, "valence": 0.5})
    saved = torch.load(tmp_path / "best.pt", weights_only=True)["weights"]
    assert len(calls) == 5 and saved.keys() == calls[1].keys()
    for name, weight in calls[1].items():
        assert torch.equal(saved[name], weight) and torch.equal(calls[4][name], weight)
    assert not torch.equal(calls[3]["head.weight"], calls[1]["head.weight"])


@pytest.fixture
def other_corpus(corpus, tmp_path):
    """other_corpus(change) -> a copy of the corpus whose rows {column: cell} went through it."""

    def make(change):
        root = tmp_path / "other"
        shutil.copytree(corpus, root, dirs_exist_ok=True)
        path = root / "Labels" / "labels_consensus.csv"
        rows = change(read_csv(path))
        lines = [",".join(cells) for cells in [rows[0].keys(), *(row.values() for row in rows)]]
        path.write_text("\n".join(lines) + "\n")
        return root

    return make


def test_attributes_scale_and_splits(other_corpus, launch, tmp_path):
    """--attributes, --scale and --splits decide columns, units and names: the same labels on
    another scale give the same run, its predictions on that scale, the third split in corpus order
    with its labels. One attribute is enough."""

    def shrink(rows):
        for row in rows:
            row |= {key: repr(1 + 4 / 6 * (float(row[key]) - 1)) for key in ("EmoDom", "EmoVal")}
        return rows

    line = ["--attributes", "valence", "dominance", "--splits", "Train", "Test1", "Development"]
    launch(tmp_path / "seven", *line)
    root = other_corpus(shrink)
    launch(tmp_path / "five", *line, "--data", root, "--scale", 1, 5)
    assert list(check_run(tmp_path / "five")["dev"]) == ["valence", "dominance"]
    name = "predictions-Development.csv"
    seven, five = (read_csv(tmp_path / run / name) for run in ("seven", "five"))
    labels = read_csv(root / "Labels" / "labels_consensus.csv")[12:20]
    for before, after, label in zip(seven, five, labels, strict=True):
        assert after["FileName"] == label["FileName"]
        for key in ("Val", "Dom"):
            scaled = 1 + 4 / 6 * (float(before[key]) - 1)
            assert float(after[key]) == pytest.approx(scaled, abs=1e-4) != float(before[key])
            assert float(after[f"Emo{key}"]) == pytest.approx(float(label[f"Emo{key}"]), abs=1e-5)
    launch(tmp_path / "one", "--attributes", "activation")
    assert list(check_run(tmp_path / "one")["test"]) == ["activation", "n"]


# ---- killed, resumed, prolonged, finished ----


class Killed(BaseException):
    """As a kill, nothing catches it."""


@pytest.fixture(scope="module")
def whole(launch, tmp_path_factory):
    """A finished run of three epochs. Meanwhile Development says 1, 0 and 2 of them, so that the
    best one is not always the last, and at the end another than before."""
    train_epoch = train.train_epoch
    evaluate = train.evaluate
    epochs = []

    def noting(*args):
        epochs.append(args[-1])
        return train_epoch(*args)

    def scripted(model, dataset, args):
        predictions, scores = evaluate(model, dataset, args)
        if dataset.utterances[0].split == "Development":
            scores = dict.fromkeys(scores, (None, 1.0, 0.0, 2.0)[epochs[-1]])
        return predictions, scores

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "train_epoch", noting)
        patch.setattr(train, "evaluate", scripted)
        folder = tmp_path_factory.mktemp("whole")
        launch(folder, *THREE)
        assert check_run(folder, 3)["best_epoch"] == 3
        yield folder


POINTS = ["last.pt 3", "best.pt 3", "last.pt 3 memory"]
POINTS += ["config.json 1 prolonged", "last.pt 2 prolonged", "best.pt 2 prolonged"]


@pytest.mark.parametrize("point", POINTS)
def test_killed_and_resumed(point, whole, launch, tmp_path, monkeypatch):
    """Killed as it wrote its best epoch and resumed, a run ends bitwise as the undisturbed one; so
    does a finished run of two epochs that is prolonged and killed in that, and one that was out of
    memory, as its result.json says until then."""
    name, n, *how = point.split()
    written = []
    atomic = cache.atomic

    def kill(path, *mode):
        written.append(Path(path).name)
        if written[-1] == name and written.count(name) == int(n):
            raise RuntimeError("can't allocate memory") if how == ["memory"] else Killed
        return atomic(path, *mode)

    if how == ["prolonged"]:
        launch(tmp_path, *THREE, "--epochs", 2)
    with monkeypatch.context() as patch, pytest.raises((Killed, MemoryError)):
        patch.setattr(cache, "atomic", kill)
        launch(tmp_path, *THREE, "--resume")
    if how == ["memory"]:
        config, result = (json.loads((tmp_path / f"{f}.json").read_text()) for f in JSON)
        assert result.keys() == {*config, "out_of_memory", "peak_memory_bytes"}
        assert result["out_of_memory"]
    else:
        assert not (tmp_path / "result.json").exists()
    launch(tmp_path, *THREE, "--resume")
    assert state(tmp_path) == state(whole)
    check_run(tmp_path, 3)


CHANGES = """lr 0.02, dropout 0.1, epochs 2, batch_size 6, eval_batch_size 3, precision bf16,
    chunk 2, padding exact, recompute, seed 3, attributes valence activation,
    splits Train Test1 Development, scale 1 7.5, layers 2, freeze_embedding, method lora,
    cached --cache nowhere, audio --data longer, labels --data other,
    encoder_sha256 --model encoder, corpus --data fewer, corpus --data reversed"""


def test_only_the_same_run_is_resumed(whole, launch, other_corpus, tmp_path, monkeypatch):
    """A run, finished or not, continues with --resume alone, and with nothing changed that its
    numbers come from; the refusal names what, and leaves the folder to the byte."""
    monkeypatch.chdir(tmp_path)
    other_corpus(lambda rows: rows[1:]).rename("fewer")
    other_corpus(lambda rows: rows[::-1]).rename("reversed")
    wave, rate = soundfile.read("fewer/Audios/DEMO_0001_0000.wav")
    other_corpus(lambda rows: rows).rename("longer")
    soundfile.write("longer/Audios/DEMO_0001_0000.wav", np.append(wave, 0), rate)
    other_corpus(lambda rows: [{**rows[0], "EmoAct": "4"}, *rows[1:]])
    encoder = tiny_encoder()
    encoder.encoder.layers[0].final_layer_norm.bias.data += 1e-3
    encoder.save_pretrained("encoder")
    models.transformers.Wav2Vec2FeatureExtractor().save_pretrained("encoder")
    unfinished = tmp_path / "unfinished"
    shutil.copytree(whole, unfinished)
    (unfinished / "result.json").unlink()
    before = tree(whole), tree(unfinished)
    for change in CHANGES.split(","):
        key, *values = change.split()
        option = [] if "--" in change else [f"--{key.replace('_', '-')}"]
        for folder in (whole, unfinished) if key in ("lr", "audio", "epochs") else (whole,):
            with pytest.raises(ValueError, match=f"is of a run with (.*; )?{key} "):
                launch(folder, *THREE, "--resume", *option, *values)
    for folder in (whole, unfinished):
        with pytest.raises(ValueError, match="holds a run; --resume continues it"):
            launch(folder, *THREE)
    assert (tree(whole), tree(unfinished)) == before and not (tmp_path / "nowhere").exists()


MAY_DIFFER = [
    "data",
    "model",
    "out",
    "workers",
    "skip_bad",
    "fill_seconds",
    "device",
    "device_memory_bytes",
    "versions",
    "precision_reason",
]


def test_a_finished_run_is_left_alone(launch, corpus, tmp_path, capsys):
    """--resume of a finished run, also from another place of its corpus, shows its result and
    touches nothing: no file of it, nor its cache, even where that is gone. A predictions file alone
    makes no run finished, and is not written over; other files do not matter, and stay. An
    unfinished run does not go on from a cache of other states."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "notes.tmp").write_text("mine")
    (run / "predictions-Test1.csv").write_text("FileName,Act,Val,EmoAct,EmoVal\n")
    before = tree(run)
    with pytest.raises(ValueError, match="'predictions-Test1.csv'. would be lost"):
        launch(run, "--cache", tmp_path / "cache")
    assert tree(run) == before
    (run / "predictions-Test1.csv").unlink()
    launch(run, "--cache", tmp_path / "cache")
    (run / "notes.tmp").unlink()
    check_run(run)
    ((states, about),) = (read_shard(path) for path in tmp_path.glob("cache/shard-*"))
    shutil.rmtree(tmp_path / "cache")
    shutil.copytree(corpus, tmp_path / "moved")
    before = tree(tmp_path)
    again = ["--cache", tmp_path / "cache", "--data", tmp_path / "moved", "--resume"]
    for name in ("config.json", "result.json"):
        config = json.loads((run / name).read_text())
        (run / name).write_text(json.dumps(config | dict.fromkeys(MAY_DIFFER, "another")))
    before = tree(tmp_path)
    capsys.readouterr()
    launch(run, *again, "--workers", 2)
    assert f"'{run}' is finished" in capsys.readouterr().out
    assert tree(tmp_path) == before
    (run / "result.json").unlink()
    items = [(name, 2 * hidden, about["crcs"][name][1]) for name, hidden in states.items()]
    cache.fill(tmp_path / "cache", about["fingerprint"], items)
    before = tree(tmp_path)
    with pytest.raises(ValueError, match="run with cache_contents"):
        launch(run, *again)
    assert tree(tmp_path) == before


def test_console(launch, tmp_path, capsys):
    """Before the first step a line says what is trained, on what and why in that precision; each
    epoch says its numbers, which split they are of, whether it is the best, and the time left."""
    launch(tmp_path, "--epochs", 2, "--layers", 2, "--precision", "fp32")
    begin, first, second, end = capsys.readouterr().out.splitlines()
    config = json.loads((tmp_path / "result.json").read_text())
    total, trained = config["total_parameters"], config["trainable_parameters"]
    assert begin.startswith(f"wav2vec2, {total:,} parameters, {trained:,} of them trained, cut 0;")
    assert "; fp32 (as asked) on CPU, " in begin
    assert re.search(r"utterances: Train \d+, Development \d+, Test1 8; \d+ steps an epoch$", begin)
    scores = r"activation -?\d\.\d{4} valence -?\d\.\d{4}"
    line = r"epoch \d/2, [36] steps: loss \d\.\d{4}, "
    line += rf"Development {scores}( \(best\))?, [\d.]+ s, 0:00:\d\d left"
    assert re.fullmatch(line, first) and " (best)" in first and re.fullmatch(line, second)
    assert second.endswith(" 0:00:00 left") and re.match(rf"Test1 with epoch \d: {scores}", end)
    history = (tmp_path / "metrics.jsonl").read_text().splitlines()
    epoch = json.loads(history[0]) | {"train_seconds": 50, "eval_seconds": 10}
    train.report_epoch(epoch, False, SimpleNamespace(epochs=4, splits=["", "Development"]))
    assert capsys.readouterr().out.endswith(" 60.0 s, 0:03:00 left\n")


def test_deleted_epochs(launch, encoder, tmp_path, monkeypatch):
    """A run whose epochs were deleted is run anew. An encoder given by a relative path is found
    from another folder, too."""
    monkeypatch.chdir(Path(encoder).parent)
    launch(tmp_path, "--model", Path(encoder).name)
    for name in ("last.pt", "best.pt"):
        (tmp_path / name).unlink()
    launch(tmp_path, "--model", Path(encoder).name, "--resume")
    monkeypatch.chdir(tmp_path)
    models.load_run(tmp_path)


def test_defaults(monkeypatch):
    """What the paper names is the default. Evaluation batches are as large as training's. On a CPU
    either kind of bf16 instructions makes bf16 the default, and none fp32."""
    paper = {"epochs": 5, "batch_size": 32, "eval_batch_size": 32, "lr": 1e-4, "dropout": 0.2}
    paper |= {"method": "partial", "layers": 3, "rank": 8, "padding": "paper", "scale": [1, 7]}
    line = "--data x --out x --device cpu --precision fp32"
    assert vars(train.parse_args(line.split())).items() >= paper.items()
    given = ["--data", "x", "--out", "x", "--batch-size", "6", "--device", "cpu"]
    for able, precision in ((), "fp32"), (("avx512_bf16",), "bf16"), (("amx_bf16",), "bf16"):
        able = dict.fromkeys(able, True)
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda able=able: able, raising=False)
        args = train.parse_args(given)
        assert (args.precision, args.eval_batch_size) == (precision, 6)


def test_demo(tmp_path, monkeypatch):
    """The demo trains the recommended row, on what it writes: from a cache in exact padding. It is
    in float32, so that `predict`, which is, too, gives what its CSV says."""
    monkeypatch.setattr(data, "make_demo", os.makedirs)
    args = vars(train.parse_args(["--demo", "--out", str(tmp_path)]))
    row = {"method": "partial", "layers": 3, "cached": True, "padding": "exact", "chunk": 4}
    assert args.items() >= (row | {"precision": "fp32", "resume": True}).items()
    assert args["data"] == str(tmp_path / "corpus") and os.listdir(tmp_path) == ["corpus"]


def test_too_small_splits(launch, corpus, encoder, other_corpus, tmp_path, monkeypatch):
    """A split of one utterance has no CCC; of 12, no batch of 13 processes."""
    root = other_corpus(lambda rows: rows[:13] + rows[20:])
    with pytest.raises(ValueError, match="'Development' has 1 usable utterances"):
        launch(tmp_path / "run", "--data", root)
    monkeypatch.setattr(train, "PROCESSES", 13)
    monkeypatch.setattr(train, "together", lambda *_: None)
    line = f"--data {corpus} --model {encoder} --out {tmp_path} --batch-size 13 --device cpu"
    with pytest.raises(ValueError, match="'Train' has 12 usable utterances, and needs 13"):
        train.run(train.parse_args(line.split()))


def test_peak_memory():
    """The peak stays when memory is freed: Table II depends on it."""
    block = bytearray(b"x") * 200_000_000
    peak = train.peak_memory("cpu")
    del block
    assert train.peak_memory("cpu") > peak - 50_000_000


def test_a_loss_that_is_not_finite(launch, tmp_path, monkeypatch):
    """Training ends with the step and the batch's utterances where the loss is no number."""
    monkeypatch.setattr(train, "ccc_loss", lambda pred, target: pred.sum() * torch.nan)
    with pytest.raises(ValueError, match="epoch 1, step 1: the loss of .('DEMO_.*){4}. is NaN"):
        launch(tmp_path)
