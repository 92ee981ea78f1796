"""The loop: exact batches in any memory, every row of Table I end to end, resuming to the bit."""

import json

import pytest
import torch
from conftest import DEPTH, chunked, read_csv, relative, step

import ccc
import model as models
import train

ROWS = {
    "full": ["--method", "full"],
    "partial": ["--layers", 2],
    "frozen": ["--layers", 2, "--freeze-prefix"],
    "lora": ["--method", "lora"],
    "partial cached": ["--layers", 2],
    "lora cached": ["--method", "lora", "--layers", 2],
}
CACHED = {"partial cached": 3, "lora cached": 2}  # of a cache of more layers, and of as many
FILES = "config.json metrics.jsonl last.pt best.pt predictions-Test1.csv result.json"
RESULT = """method layers precision padding cached freeze_prefix chunk recompute seed best_epoch dev
test train_seconds
    eval_seconds trainable_parameters total_parameters peak_memory_bytes device device_memory_bytes
    attributes processes cache model versions"""
LINE = "epoch loss dev train_seconds eval_seconds peak_memory_bytes"
every_row = pytest.mark.parametrize("name", ROWS)
NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


@pytest.fixture
def row(cached):
    """row(name) -> options of train.py for that row."""

    def options(name):
        return [*ROWS[name], *(["--cache", cached(CACHED[name])] if name in CACHED else [])]

    return options


@every_row
def test_chunks_are_the_whole_batch(name, row, prepare):
    """In exact padding, dropout off, any chunk size gives the whole batch's predictions, loss and
    gradients; the whole batch's predictions are the model's, row by row."""
    made = prepare(*row(name), "--batch-size", 7)
    model, cached = made.model.eval(), made.args.cached
    whole = step(model, made.batch, cached=cached)
    direct = (model.trained if cached else model)(*made.batch[:2])
    assert len(set(made.batch[1])) == 7  # ragged
    assert relative(whole["predictions"], direct.detach()) < 1e-6
    for chunk in (1, 3, 6, 100):
        assert relative(step(model, made.batch, cached=cached, chunk=chunk), whole) < 1e-5


@pytest.mark.parametrize("padding", ["paper", "exact"])
@every_row
def test_recompute_changes_nothing(name, padding, row, prepare):
    """Dropout on, recomputed activations give the same predictions, loss and gradients bitwise."""
    made = prepare(*row(name), "--padding", padding, "--batch-size", 7)
    model = made.model.train()
    for chunk in (None, 3):
        how = {"cached": made.args.cached, "chunk": chunk}
        plain, recomputed = (step(model, made.batch, **how, recompute=r) for r in (False, True))
        assert not torch.equal(step(model, made.batch, 1, **how)["loss"], plain["loss"])  # dropout
        assert plain.keys() == recomputed.keys()
        assert all(torch.equal(plain[key], recomputed[key]) for key in plain)


def test_recompute_keeps_nothing(prepare):
    """With --recompute a forward pass keeps less than a hundredth for the backward pass."""
    made, kept = prepare("--method", "full"), {}
    for recompute in (False, True):
        tensors = []
        with torch.autograd.graph.saved_tensors_hooks(tensors.append, id):
            chunks, _ = chunked(made.batch[1], made.batch[0])
            train.predict(made.model, chunks, "cpu", recompute=recompute)
        kept[recompute] = sum(tensor.nbytes for tensor in tensors)
    assert 0 < kept[True] < kept[False] / 100


@torch.no_grad()
@pytest.mark.parametrize("name", ["full", "partial cached"])
@pytest.mark.parametrize("chunk", [1, 3])
def test_evaluation_order(name, chunk, row, prepare):
    """Read in order of length, in chunks, each utterance gets the prediction that it gets alone, at
    its own place."""
    made = prepare(*row(name), "--chunk", chunk, "--batch-size", 5)
    dataset = made.datasets["Test1"]
    order = [i for rows, _ in train.make_batches(dataset, made.model, made.args) for i in rows]
    assert order == sorted(range(8), key=dataset.lengths.__getitem__) != list(range(8))
    predictions, scores = train.evaluate(made.model, dataset, made.args)
    single = [[(x[None], [len(x)])] for x, _ in (dataset[i] for i in range(8))]
    alone = [train.predict(made.model, chunks, "cpu", made.args.cached) for chunks in single]
    assert relative(predictions, torch.cat(alone)) < 1e-5
    expected = ccc.ccc(predictions, dataset.targets).tolist()
    assert list(scores.values()) == pytest.approx(expected)


@pytest.mark.parametrize("chunk", [None, 3])
def test_paper_padding_is_zeros(chunk, prepare):
    """In paper padding each chunk is zero-padded to its longest, in evaluation and training."""
    made = prepare("--padding", "paper", *(["--chunk", chunk] if chunk else []))
    dataset = made.datasets["Train"]
    for epoch in (None, 1):
        for batch in train.make_batches(dataset, made.model, made.args, epoch):
            rows, mine, chunks = train.load_batch(dataset, made.args, batch)
            assert mine == list(range(len(rows))) and len(chunks) == -(-len(rows) // (chunk or 4))
            for inputs, lengths in chunks:
                assert inputs.shape == (len(lengths), max(lengths))
                waves = [dataset[i][0] for i in rows[: len(lengths)]]
                assert [len(wave) for wave in waves] == lengths
                for padded, wave in zip(inputs, waves, strict=True):
                    assert torch.equal(padded[: len(wave)], wave) and not padded[len(wave) :].any()
                rows = rows[len(lengths) :]


def test_training_order(prepare):
    """An epoch's order depends on seed and epoch alone, holds each utterance once, and has no batch
    of one."""
    made = prepare()

    def order(epoch, seed=0, batch_size=4):
        made.args.seed, made.args.batch_size = seed, batch_size
        batches = train.make_batches(made.datasets["Train"], made.model, made.args, epoch)
        return [rows for rows, _ in batches]

    assert order(1) == order(1)
    assert len({str(order(epoch, seed)) for epoch in (1, 2, 3) for seed in (0, 1)}) == 6
    assert sorted(i for rows in order(1) for i in rows) == list(range(12))
    assert [len(rows) for rows in order(1, batch_size=11)] == [11]


def test_an_epoch(launch, prepare, tmp_path):
    """An epoch is this loop, to the bit: in train mode, a step of AdamW at 1e-4 on 1 - CCC for each
    batch, dropout seeded by seed, epoch and process."""
    launch(tmp_path, "--padding", "exact", "--seed", 3)
    made = prepare("--seed", 3)
    trained, dataset = models.trainable(made.model.train()), made.datasets["Train"]
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-4, fused=True)
    torch.manual_seed(3001000)
    for rows, _ in train.make_batches(dataset, made.model, made.args, 1):
        optimizer.zero_grad()
        inputs, lengths, targets = train.data.collate([dataset[i] for i in rows])
        predictions = made.model(inputs, lengths)
        (1 - ccc.ccc(predictions, targets)).mean().backward()
        optimizer.step()
    saved = torch.load(tmp_path / "last.pt", weights_only=True)["weights"]
    assert saved.keys() == trained.keys()
    assert all(torch.equal(saved[name], parameter) for name, parameter in trained.items())


def check_run(folder):
    """A run folder has every file and key, and agrees with its predictions -> result.json"""
    assert {path.name for path in folder.iterdir()} - {".lock"} == set(FILES.split())
    result, config = (json.loads((folder / f"{f}.json").read_text()) for f in ("result", "config"))
    (line,) = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    assert result.keys() >= set(RESULT.split()) and line.keys() >= set(LINE.split())
    assert line["dev"] == result["dev"] and line["epoch"] == result["best_epoch"] == 1
    assert config.items() <= result.items()
    saved = torch.load(folder / "best.pt", weights_only=True)["weights"]
    assert result["trainable_parameters"] == sum(weight.numel() for weight in saved.values())
    n, scores = ccc.score_file(folder / "predictions-Test1.csv")
    expected = [result["test"][attribute] for attribute in result["attributes"]]
    assert n == result["test"]["n"]
    assert sorted(scores.values()) == pytest.approx(sorted(expected), abs=1e-5)
    return result


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=NEEDS_GPU)])
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@every_row
def test_every_row(name, precision, device, row, launch, tmp_path):
    """Every row of Table I trains in every precision, on a GPU in chunks with recomputation, and
    writes its whole run folder, consistent in itself."""
    options = [*row(name), "--precision", precision, "--seed", 3, "--device", device]
    exact = ["--padding", "exact", "--chunk", 2, "--recompute"] if device == "cuda" else []
    launch(tmp_path, *options, *exact)
    result = check_run(tmp_path)
    assert (result["precision"], result["seed"], result["test"]["n"]) == (precision, 3, 8)
    assert result["method"] == name.replace("frozen", "partial").split()[0]
    assert result["layers"] == (DEPTH if name in ("full", "lora") else 2)
    assert result["cached"] == (result["cache"] is not None) == ("cached" in name)
    assert result["freeze_prefix"] == ("cached" in name or name == "frozen")
    assert device == "cpu" or result["device"] == torch.cuda.get_device_name()


def test_best_epoch(launch, tmp_path, monkeypatch):
    """Test1 is scored once, with the weights of the epoch whose mean Development CCC is highest,
    the first of equals; neither one attribute nor the last epoch decides."""
    scripted = iter([(0.6, 0.1), (0.2, 0.6), (0.3, 0.5), (0.7, 0.0)])
    calls, evaluate = [], train.evaluate

    def with_script(model, *args):
        predictions, scores = evaluate(model, *args)
        calls.append({name: p.detach().clone() for name, p in models.trainable(model).items()})
        return predictions, dict(zip(scores, next(scripted, scores.values()), strict=True))

    monkeypatch.setattr(train, "evaluate", with_script)
    launch(tmp_path, "--epochs", 4, "--lr", 0.01)
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["best_epoch"], result["dev"]) == (2, {"activation": 0.2, "valence": 0.6})
    saved = torch.load(tmp_path / "best.pt", weights_only=True)["weights"]
    assert len(calls) == 5 and saved.keys() == calls[1].keys()
    for name, weight in calls[1].items():
        assert torch.equal(saved[name], weight) and torch.equal(calls[4][name], weight)
    assert not torch.equal(calls[3]["head.weight"], calls[1]["head.weight"])


def test_attributes(corpus, launch, tmp_path):
    """--attributes dominance valence: two columns in that order, in scores, weights, predictions,
    which hold the split in corpus order with its labels. One attribute is enough."""
    launch(tmp_path / "two", "--attributes", "dominance", "valence", "--padding", "exact")
    result = check_run(tmp_path / "two")
    assert list(result["dev"]) == ["dominance", "valence"] == result["attributes"]
    rows, labels = read_csv(tmp_path / "two" / "predictions-Test1.csv"), {}
    for row in read_csv(f"{corpus}/Labels/labels_consensus.csv"):
        if row["Split_Set"] == "Test1":
            labels[row["FileName"]] = [float(row["EmoDom"]), float(row["EmoVal"])]
    assert list(rows[0]) == ["FileName", "Dom", "Val", "EmoDom", "EmoVal"]
    assert [row["FileName"] for row in rows] == list(labels)
    for row, expected in zip(rows, labels.values(), strict=True):
        assert [float(row["EmoDom"]), float(row["EmoVal"])] == pytest.approx(expected, abs=1e-5)
    launch(tmp_path / "one", "--attributes", "activation")
    assert list(check_run(tmp_path / "one")["test"]) == ["activation", "n"]
    saved = torch.load(tmp_path / "one" / "best.pt", weights_only=True)["weights"]
    assert saved["head.weight"].shape[0] == 1
