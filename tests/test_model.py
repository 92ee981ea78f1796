"""The model of every family against Hugging Face's own forward on an untouched encoder, parameter
counts of the paper, and checkpoints in and out."""

import copy
import shutil

import pytest
import torch
import transformers
from conftest import DEPTH, WIDTH, read_csv, relative, step, tiny_config, tiny_encoder
from torch import nn
from torch.nn.utils import parametrize

import data
import model as models
import train

LARGE = {"do_stable_layer_norm": True, "feat_extract_norm": "layer", "conv_bias": True}
FAMILIES = {  # what differs from tiny_config's wav2vec 2.0 base
    "wav2vec2 base": {},
    "wav2vec2 large": LARGE,
    "hubert base": {"kind": "Hubert", "feat_proj_layer_norm": False},
    "hubert large": {"kind": "Hubert"} | LARGE,
    "wavlm base": {"kind": "WavLM"},
    "wavlm large": {"kind": "WavLM"} | LARGE | {"conv_bias": False},
    "unispeech": {"kind": "UniSpeech"},
    "unispeech-sat": {"kind": "UniSpeechSat"} | LARGE,
}
# rows of Table I, and what each trains of the real encoders, heads included; last, their size
ROWS = [("full", None, False), ("partial", 3, False), ("partial", 2, False), ("partial", 1, False)]
ROWS += [("partial", 3, True), ("partial", 2, True), ("partial", 1, True), ("lora", None, False)]
REAL_LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}
REAL_LARGE |= {"intermediate_size": 4096} | LARGE
W2V2 = "90172034 26381186 19293314 12205442 21265154 14177282 7089410 296450 94371712"
W2V2_LARGE = "311229570 46708866 34112642 21516418 37792770 25196546 12600322 788482 315438720"
WAVLM = "90182258 26382782 19294378 12205974 21266750 14178346 7089942 296450 94381936"
WAVLM_LARGE = "311247554 46710474 34113714 21516954 37794378 25197618 12600858 788482 315453120"
COUNTS = [(None, {}, W2V2), ("Hubert", {}, W2V2), ("WavLM", {}, WAVLM)]
COUNTS += [("Wav2Vec2", REAL_LARGE, W2V2_LARGE), ("Hubert", REAL_LARGE, W2V2_LARGE)]
COUNTS += [("WavLM", REAL_LARGE | {"conv_bias": False}, WAVLM_LARGE)]
# what facebook/wav2vec2-base's config.json asks for in training, more of it; and no dropout
FLAGS = {"gradient_checkpointing": True, "layerdrop": 1.0, "apply_spec_augment": True}
FLAGS |= {"mask_time_prob": 0.9, "mask_time_length": 2, "mask_feature_prob": 0.9}
FLAGS |= {"mask_feature_length": 2, **dict.fromkeys(models.DROPOUTS, 0.0)}
RUNS = [("partial", "wav2vec2 base"), *(("lora", family) for family in FAMILIES)]
every_family = pytest.mark.parametrize("family", FAMILIES)


def hugging_face(reference, wave):
    """A head on the plain mean of the frames of Hugging Face's own forward."""
    return reference.head(reference.encoder(wave).last_hidden_state.mean(1))


def tiny_model(padding, method="full", layers=None, freeze_prefix=False, family="wav2vec2 base"):
    """(our model, {an untouched encoder of the same weights, a copy of the head}), in eval mode."""
    encoder = tiny_encoder(**FAMILIES[family])
    model = models.EmotionModel(copy.deepcopy(encoder), padding=padding)
    models.freeze(model, method, layers, freeze_prefix)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_b"):  # zero would hide what adapters do
            nn.init.normal_(parameter, std=0.1)
    return model.eval(), nn.ModuleDict({"encoder": encoder, "head": copy.deepcopy(model.head)})


def ragged():
    """Noise of 25 ms to 0.8 s, two of one length: wave (B, S), samples B ints, targets (B, A)."""
    samples = [9000, 4001, 12345, 400, 9000]
    waves = [torch.randn(n, generator=torch.Generator().manual_seed(n)) for n in samples]
    return data.collate(zip(waves, torch.arange(10.0).view(5, 2), strict=True))


@torch.no_grad()
@every_family
def test_every_cut(family):
    """Cut before any layer, trained(frozen(x)) is Hugging Face's forward: in paper padding that of
    the padded batch, in exact padding that of each waveform alone, which is not the same."""
    wave, samples, _ = ragged()
    rows = [row[None, :n] for row, n in zip(wave, samples, strict=True)]
    for padding in ("paper", "exact"):
        model, reference = tiny_model(padding, family=family)
        batch = hugging_face(reference, wave)
        alone = torch.cat([hugging_face(reference, row) for row in rows])
        for model.cut in (None, *range(DEPTH + 1)):
            assert relative(model(wave, samples), batch if padding == "paper" else alone) < 1e-5
    assert relative(batch, alone) > 1e-2


class PlusBA(nn.Module):
    """A weight W as W + 16 / 8 B A."""

    def __init__(self, lora):
        super().__init__()
        self.lora_a, self.lora_b = copy.deepcopy((lora.lora_a, lora.lora_b))

    def forward(self, weight):
        return weight + 2 * self.lora_b @ self.lora_a


@every_family
@pytest.mark.parametrize(("method", "layers"), [("full", None), ("lora", 2)])
def test_gradients(method, layers, family):
    """A step's predictions and gradients in paper padding are those of Hugging Face's forward: with
    LoRA, of that with W + alpha / rank B A for the weights of q and v, to which it merges."""
    model, reference = tiny_model("paper", method, layers, family=family)
    for i in range(DEPTH - 2, DEPTH) if method == "lora" else ():
        for name in ("q_proj", "v_proj"):
            lora = getattr(model.encoder.encoder.layers[i].attention, name)
            plain = getattr(reference.encoder.encoder.layers[i].attention, name)
            parametrize.register_parametrization(plain, "weight", PlusBA(lora))
            x = torch.randn(7, WIDTH)
            assert type(lora.merge()) is nn.Linear and relative(lora.merge()(x), plain(x)) < 1e-5
    wave, samples, targets = ragged()
    ours, predictions = step(model, (wave, samples, targets)), hugging_face(reference, wave)
    train.ccc_loss(predictions, targets).backward()
    assert relative(ours.pop("predictions"), predictions) < 1e-5
    parts = reference.named_parameters()
    parts = {name.replace("parametrizations.weight.0.", ""): part for name, part in parts}
    del ours["loss"]
    assert relative(ours, {name: parts[name].grad for name in ours}) < 1e-5


@every_family
@pytest.mark.parametrize("method", ["partial", "lora"])
def test_chunks_and_caches(family, method):
    """In exact padding chunks, recomputed, give the whole batch's predictions and gradients, and so
    does the trained half on what each utterance alone makes the frozen half give: a cache."""
    model, _ = tiny_model("exact", method, 2, True, family)
    wave, samples, targets = batch = ragged()
    whole = step(model, batch)
    assert relative(step(model, batch, chunk=2, recompute=True), whole) < 1e-5
    single = [model.frozen(w[None, :n], [n])[0][0] for w, n in zip(wave, samples, strict=True)]
    cached = data.collate(zip(single, targets, strict=True))
    assert relative(step(model, cached, cached=True), whole) < 1e-5


@torch.no_grad()
def test_frames():
    """frames() is Hugging Face's count and what the CNN makes; 400 samples are the shortest."""
    model, reference = tiny_model("exact")
    for n in (400, 719, 720, 16000, 16079, 16080):
        made = reference.encoder.feature_extractor(torch.zeros(1, n)).shape[2]
        assert reference.encoder._get_feat_extract_output_lengths(n) == made == model.frames(n)
    assert (model.frames(399), model.frames(400), data.MIN_SAMPLES) == (0, 1, 400)


@torch.no_grad()
def test_lora_starts_as_the_base():
    """Before its first step a LoRA model's output is bitwise the base model's."""
    model, _ = tiny_model("exact")
    base = model(*ragged()[:2])
    models.freeze(model, "lora")
    assert torch.equal(model(*ragged()[:2]), base)


def test_wrong_words():
    """A padding, method or number of layers that does not exist is refused by class or function."""
    with pytest.raises(ValueError, match="excat"):
        tiny_model("excat")
    for method, layers in (("partal", 2), ("partial", 5), ("partial", 0), ("full", 3)):
        with pytest.raises(ValueError, match=method):
            tiny_model("exact", method, layers)


@pytest.mark.parametrize("family", ["wav2vec2 base", "wavlm large"])
@pytest.mark.parametrize(("method", "layers", "freeze_prefix"), ROWS)
def test_what_is_trained(method, layers, freeze_prefix, family):
    """The trainable names are each row's, and a backward pass reaches all of them and nothing else.
    Of a model in train mode the frozen parts stay in eval mode: they give the same twice."""
    model, reference = tiny_model("exact", method, layers, freeze_prefix, family)
    layers = range(DEPTH - (layers or DEPTH), DEPTH)
    frozen = ["feature_extractor.", "masked_spec_embed"]
    frozen += [f"encoder.layers.{i}." for i in range(layers.start)]
    if freeze_prefix or method == "lora":
        frozen += ["feature_projection.", "encoder.pos_conv_embed.", "encoder.dropout."]
        frozen += ["encoder.layer_norm."] if family == "wav2vec2 base" else []  # else it is last
    frozen = tuple(f"encoder.{part}" for part in frozen)
    names = {n for n, _ in reference.named_parameters() if not n.startswith(frozen)}
    if method == "lora":
        modules = [f"encoder.encoder.layers.{i}.attention.{x}_proj" for i in layers for x in "qv"]
        names = {f"{m}.lora_{x}" for m in modules for x in "ab"} | {"head.weight", "head.bias"}
    wave, samples, _ = batch = ragged()
    gradients = step(model.train(), batch)
    assert set(models.trainable(model)) == gradients.keys() - {"predictions", "loss"} == names
    assert all(gradients[name].any() for name in names)
    for name, module in model.named_modules():
        assert module.training != f"{name}.".startswith(frozen)
    hidden, frames = model.frozen(wave, samples)
    assert torch.equal(hidden, model.frozen(wave, samples)[0])
    assert not torch.equal(model.trained(hidden, frames), model.trained(hidden, frames))


@pytest.mark.parametrize(("kind", "shape", "counts"), COUNTS)
def test_counts(kind, shape, counts, tmp_path, capsys):
    """`model.py params` counts from shapes alone what each row trains of a real encoder, and its
    share of all: without --model of wav2vec2-base, where the paper has the same numbers."""
    if kind:
        getattr(transformers, f"{kind}Config")(**shape).save_pretrained(tmp_path)
    models.main(["params", "--model", str(tmp_path)] if kind else ["params"])
    *counts, total = map(int, counts.split())
    lines = capsys.readouterr().out.splitlines()
    for line, (method, layers, _), count in zip(lines, ROWS, counts, strict=True):
        assert line.split()[:2] == [f"{count:,}", f"{count / total:.1%}"]
        assert f"{method} {layers or 'all'}" in line


def write_old_layout(folder, lacking=None):
    """pytorch_model.bin as on the hub: Wav2Vec2ForPreTraining, with weight_g and weight_v."""
    config = tiny_config(num_codevectors_per_group=8, codevector_dim=16, proj_codevector_dim=16)
    model = transformers.Wav2Vec2ForPreTraining(config)
    weights = model.state_dict()
    for new, old in (("original0", "weight_g"), ("original1", "weight_v")):
        name = "wav2vec2.encoder.pos_conv_embed.conv."
        weights[name + old] = weights.pop(f"{name}parametrizations.weight.{new}")
    weights.pop(f"wav2vec2.encoder.{lacking}", None)
    torch.save(dict(weights), folder / "pytorch_model.bin")
    config.save_pretrained(folder)
    audio = transformers.Wav2Vec2FeatureExtractor(do_normalize=False, sampling_rate=8000)
    audio.save_pretrained(folder)
    return model.wav2vec2.state_dict()


def test_old_checkpoint_layout(tmp_path, capfd, caplog, monkeypatch):
    """A checkpoint in the hub's older layout, with heads of another task, loads completely, bitwise
    and quietly, with its own preprocessor's settings."""
    expected = write_old_layout(tmp_path)
    transformers.logging.set_verbosity_warning()
    transformers.logging.enable_progress_bar()
    monkeypatch.setattr(transformers.logging.get_logger(), "propagate", True)  # to caplog
    encoder, audio = models.load_encoder(str(tmp_path))
    assert capfd.readouterr() == ("", "") and not caplog.records
    assert relative(encoder.state_dict(), expected) == 0
    assert audio == {"sample_rate": 8000, "normalise": False}


@pytest.mark.parametrize("lacking", ["pos_conv_embed.conv.weight_g", "layers.2.layer_norm.bias"])
def test_missing_weight_is_an_error(lacking, tmp_path):
    """A checkpoint that lacks one weight is refused."""
    write_old_layout(tmp_path, lacking)
    with pytest.raises(ValueError, match="1 weights missing or misshapen"):
        models.load_encoder(str(tmp_path))


@pytest.mark.parametrize("family", ["wav2vec2 base", "wavlm base"])
def test_training_flags_are_not_obeyed(family, tmp_path):
    """With a config.json that asks for checkpointing, layer drop and SpecAugment, a step in train
    mode runs each layer once and gives what it gives in eval mode, as its dropouts are 0."""
    written = tiny_encoder(**FAMILIES[family])
    written.config.update(FLAGS)
    written.save_pretrained(tmp_path)
    transformers.Wav2Vec2FeatureExtractor().save_pretrained(tmp_path)
    encoder, _ = models.load_encoder(str(tmp_path))
    model, calls = models.EmotionModel(encoder, dropout=0.0), []
    models.freeze(model, "full")
    for layer in encoder.encoder.layers:
        layer.attention.q_proj.register_forward_hook(lambda *_: calls.append(1))
    trained = step(model.train(), ragged())
    assert len(calls) == DEPTH
    assert relative(trained, step(model.eval(), ragged())) < 1e-6
    for layer in encoder.encoder.layers:
        layer.attention.dropout = 0.5  # what is obeyed: in training only
    assert relative(step(model.train(), ragged()), trained) > 1e-3


def test_identity():
    """Equal weights with other heads, strides, activation or dropout are another encoder, and so is
    one changed weight; masked_spec_embed, which nothing uses, is no part of it."""
    base = models.identity(tiny_encoder())
    changes = {"num_attention_heads": 2, "hidden_act": "relu", "attention_dropout": 0.2}
    changes |= {"conv_stride": (5, 2, 2, 2, 2, 2, 1)}
    assert len({models.identity(tiny_encoder(**{k: v})) for k, v in changes.items()} | {base}) == 5
    changed = tiny_encoder()
    changed.masked_spec_embed.data += 1
    assert models.identity(changed) == base
    changed.encoder.layers[3].final_layer_norm.bias.data[0] += 1e-6
    assert models.identity(changed) != base


@pytest.fixture(scope="module", params=RUNS, ids=", ".join)
def run(request, launch, tmp_path_factory):
    """A run in exact padding and float32; steps so large that every trained part has moved."""
    (method, family), folder = request.param, tmp_path_factory.mktemp("run")
    tiny_encoder(**FAMILIES[family]).save_pretrained(folder / "encoder")
    audio = transformers.Wav2Vec2FeatureExtractor(do_normalize=method == "partial")
    audio.save_pretrained(folder / "encoder")
    options = ["--method", method, "--epochs", 2, "--lr", 0.01, "--padding", "exact"]
    launch(folder, *options, "--model", folder / "encoder")
    return folder


def test_saved_run_has_its_heads(run):
    """A loaded run holds all that was trained, heads included."""
    saved = torch.load(run / "best.pt", weights_only=True)["weights"]
    assert {"head.weight", "head.bias"} < saved.keys()
    assert relative(models.trainable(models.load_run(run)[0]), saved) == 0


def test_predict_command(run, corpus, tmp_path, monkeypatch):
    """`model.py predict` gives, on both scales, what the run wrote for its test split."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # which rounds otherwise
    expected = read_csv(run / "predictions-Test1.csv")
    models.main(["predict", str(run), f"{corpus}/Audios", "--csv", str(tmp_path / "all.csv")])
    found = {row["FileName"]: row for row in read_csv(tmp_path / "all.csv")}
    assert (len(expected), len(found)) == (8, 28)
    for row in expected:
        for scale in ("Act", "Val"):
            value, same = float(row[scale]), found[row["FileName"]]
            assert float(same[scale]) == pytest.approx(value, abs=1e-4)
            assert float(same[f"{scale}01"]) == pytest.approx((value - 1) / 6, abs=1e-5)


@torch.no_grad()
def test_export_of_every_family(run, corpus, tmp_path):
    """A run, LoRA merged, exports to its family's class of Hugging Face's, a regression with named
    labels that gives, behind the exported preprocessor, the run's numbers."""
    models.main(["export", str(run), str(tmp_path)])
    exported = transformers.AutoModelForAudioClassification.from_pretrained(tmp_path).eval()
    extractor = transformers.AutoFeatureExtractor.from_pretrained(tmp_path)
    model, audio = models.load_run(run)
    assert type(exported.base_model) is type(model.encoder)
    assert exported.config.id2label == {0: "activation", 1: "valence"}
    assert exported.config.problem_type == "regression"
    dataset = data.SpeechDataset(data.read_corpus(corpus)[0][:3], **audio)
    for i, utterance in enumerate(dataset.utterances):
        plain, wave = data.load_audio(utterance.path), dataset[i][0]
        logits = exported(**extractor(plain, sampling_rate=16000, return_tensors="pt")).logits
        assert relative(logits, model(wave[None], [len(wave)])) < 1e-5


def test_a_run_elsewhere(launch, encoder, tmp_path):
    """With --model a run is used where its encoder now lies; another encoder there is refused."""
    shutil.copytree(encoder, tmp_path / "first")
    launch(tmp_path / "run", "--model", tmp_path / "first")
    (tmp_path / "first").rename(tmp_path / "second")
    moved = ["--model", str(tmp_path / "second")]
    models.main(["export", str(tmp_path / "run"), str(tmp_path / "out"), *moved])
    tiny_encoder(num_attention_heads=2).save_pretrained(tmp_path / "second")
    with pytest.raises(ValueError, match="was trained from another encoder than .*second"):
        models.load_run(tmp_path / "run", str(tmp_path / "second"))
