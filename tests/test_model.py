"""The model of every family against Hugging Face's own forward on an untouched encoder, parameter
counts of the paper, and checkpoints in and out."""

import copy
import json
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
# trainable parameters of Table I's rows, heads included, of each real encoder, and of all of it
ROWS = [("full", None, False), ("partial", 3, False), ("partial", 2, False), ("partial", 1, False)]
ROWS += [("partial", 3, True), ("partial", 2, True), ("partial", 1, True), ("lora", None, False)]
REAL_LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}
REAL_LARGE |= {"intermediate_size": 4096} | LARGE
W2V2 = "90172034 26381186 19293314 12205442 21265154 14177282 7089410 296450 94371712"
W2V2_LARGE = "311229570 46708866 34112642 21516418 37792770 25196546 12600322 788482 315438720"
WAVLM = "90182258 26382782 19294378 12205974 21266750 14178346 7089942 296450 94381936"
WAVLM_LARGE = "311247554 46710474 34113714 21516954 37794378 25197618 12600858 788482 315453120"
COUNTS = [("Wav2Vec2", {}, W2V2), ("Hubert", {}, W2V2), ("WavLM", {}, WAVLM)]
COUNTS += [("Wav2Vec2", REAL_LARGE, W2V2_LARGE), ("Hubert", REAL_LARGE, W2V2_LARGE)]
COUNTS += [("WavLM", REAL_LARGE | {"conv_bias": False}, WAVLM_LARGE)]
every_family = pytest.mark.parametrize("family", FAMILIES)
every_row = pytest.mark.parametrize(("method", "layers", "freeze_prefix"), ROWS)


def tiny_model(padding, method="full", layers=None, freeze_prefix=False, family="wav2vec2 base"):
    """(our model, Hugging Face's untouched encoder of the same weights), both in eval mode."""
    encoder = tiny_encoder(**FAMILIES[family])
    model = models.EmotionModel(copy.deepcopy(encoder), padding=padding)
    models.freeze(model, method, layers, freeze_prefix)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_b"):  # zero would hide what adapters do
            nn.init.normal_(parameter, std=0.1)
    return model.eval(), encoder


def ragged():
    """Noise of 25 ms to 0.8 s, two of one length, zero-padded: wave (B, S), samples B ints."""
    samples = [9000, 4001, 12345, 400, 9000]
    waves = [torch.randn(n, generator=torch.Generator().manual_seed(n)) for n in samples]
    return nn.utils.rnn.pad_sequence(waves, batch_first=True), samples


def hugging_face(model, encoder, wave):
    """Our head on the plain mean of the frames of Hugging Face's own forward."""
    return model.head(encoder(wave).last_hidden_state.mean(1))


def alone(model, encoder):
    rows = zip(*ragged(), strict=True)
    return torch.cat([hugging_face(model, encoder, wave[None, :n]) for wave, n in rows])


@torch.no_grad()
@every_family
def test_every_cut(family):
    """Cut before any layer, trained(frozen(x)) is Hugging Face's forward: in paper padding of the
    padded batch; in exact padding of each waveform alone. Paper padding is not that of each alone."""
    for padding in ("paper", "exact"):
        model, encoder = tiny_model(padding, family=family)
        batch, single = hugging_face(model, encoder, ragged()[0]), alone(model, encoder)
        expected = batch if padding == "paper" else single
        for model.cut in (None, *range(DEPTH + 1)):
            assert relative(model(*ragged()), expected) < 1e-5
        assert relative(batch, single) > 1e-2


@every_family
def test_gradients(family):
    """The gradients of a full step in paper padding are those of Hugging Face's forward."""
    model, encoder = tiny_model("paper", family=family)
    wave, samples = ragged()
    ours = step(model, (wave, samples, torch.arange(10.0).view(5, 2)))
    head = copy.deepcopy(model.head)
    head.zero_grad()
    pooled = encoder(wave).last_hidden_state.mean(1)
    train.ccc_loss(head(pooled), torch.arange(10.0).view(5, 2)).backward()
    expected = {f"encoder.{n}": p.grad for n, p in encoder.named_parameters() if p.grad is not None}
    expected |= {f"head.{name}": p.grad for name, p in head.named_parameters()}
    del ours["predictions"], ours["loss"]
    assert relative(ours, {name: expected[name] for name in ours}) < 1e-5
    assert len(ours) > len(model.encoder.encoder.layers) * 16


class PlusBA(nn.Module):
    """A weight W as W + 16 / 8 B A."""

    def __init__(self, lora):
        super().__init__()
        self.a = nn.Parameter(lora.lora_a.detach().clone())
        self.b = nn.Parameter(lora.lora_b.detach().clone())

    def forward(self, weight):
        return weight + 2 * self.b @ self.a


@every_family
def test_lora(family):
    """LoRA on the last two layers is Hugging Face's forward with W + alpha / rank B A for the weights
    of q and v, in output and in the gradients of A and B; merged it computes the same."""
    model, encoder = tiny_model("paper", "lora", 2, family=family)
    wave, samples = ragged()
    ours, expected = step(model, (wave, samples, torch.arange(10.0).view(5, 2))), {}
    for i in (DEPTH - 2, DEPTH - 1):
        for name in ("q_proj", "v_proj"):
            lora = getattr(model.encoder.encoder.layers[i].attention, name)
            plain = getattr(encoder.encoder.layers[i].attention, name)
            expected[f"encoder.encoder.layers.{i}.attention.{name}.lora_"] = PlusBA(lora)
            assert type(merged := lora.merge()) is nn.Linear
            x = torch.randn(7, WIDTH)
            assert relative(merged(x).detach(), lora(x).detach()) < 1e-5
            last = list(expected.values())[-1]
            parametrize.register_parametrization(plain, "weight", last)
    predictions = hugging_face(model, encoder, wave)
    train.ccc_loss(predictions, torch.arange(10.0).view(5, 2)).backward()
    assert relative(ours["predictions"], predictions.detach()) < 1e-5
    found = {name: gradient for name, gradient in ours.items() if "lora" in name}
    gradients = {f"{n}{part}": getattr(p, part).grad for n, p in expected.items() for part in "ab"}
    assert relative(found, gradients) < 1e-5 and len(found) == 8


@every_family
@pytest.mark.parametrize("method", ["partial", "lora"])
def test_chunks_and_caches(family, method):
    """In exact padding chunks, recomputed, give the whole batch's predictions and gradients, and so
    does the trained half on what each utterance alone makes the frozen half give: a cache."""
    model, _ = tiny_model("exact", method, 2, True, family)
    wave, samples = ragged()
    whole = step(model, (wave, samples, torch.arange(10.0).view(5, 2)))
    parts = step(model, (wave, samples, torch.arange(10.0).view(5, 2)), chunk=2, recompute=True)
    assert relative(parts, whole) < 1e-5
    single = [model.frozen(w[None, :n], [n])[0][0] for w, n in zip(wave, samples, strict=True)]
    hidden, frames, _ = data.collate([(h, torch.zeros(0)) for h in single])
    cached = step(model, (hidden, frames, torch.arange(10.0).view(5, 2)), cached=True)
    assert relative(cached, whole) < 1e-5


@torch.no_grad()
def test_frames():
    """frames() is Hugging Face's count and what the convolutions make, at the edges of a frame, too;
    400 samples are the shortest."""
    model, encoder = tiny_model("exact")
    for n in (400, 719, 720, 16000, 16079, 16080):
        assert encoder._get_feat_extract_output_lengths(n) == model.frames(n)
        assert encoder.feature_extractor(torch.zeros(1, n)).shape[2] == model.frames(n)
    assert (model.frames(399), model.frames(400), data.MIN_SAMPLES) == (0, 1, 400)


@torch.no_grad()
def test_lora_starts_as_the_base():
    """Before its first step a LoRA model's output is bitwise the base model's."""
    base, adapted = (models.EmotionModel(tiny_encoder()).eval() for _ in range(2))
    models.freeze(adapted, "lora")
    adapted.head = base.head
    assert torch.equal(adapted(*ragged()), base(*ragged()))


def test_wrong_words():
    """A padding, method or number of layers that does not exist is refused by class and function."""
    with pytest.raises(ValueError, match="excat"):
        models.EmotionModel(tiny_encoder(), padding="excat")
    model, _ = tiny_model("exact")
    for method, layers in (("partal", 2), ("partial", 5), ("partial", 0), ("full", 3)):
        with pytest.raises(ValueError, match=method):
            models.freeze(model, method, layers)


@pytest.mark.parametrize("family", ["wav2vec2 base", "wavlm large"])
@every_row
def test_what_is_trained(method, layers, freeze_prefix, family):
    """The trainable names are each row's, and a backward pass reaches every one of them and nothing
    else. The large kind's last LayerNorm is behind every cut."""
    model, encoder = tiny_model("exact", method, layers, freeze_prefix, family)
    first, names = DEPTH - (layers or DEPTH), {"head.weight", "head.bias"}
    if method == "lora":
        modules = [f"{i}.attention.{m}_proj" for i in range(first, DEPTH) for m in "qv"]
        names |= {f"encoder.encoder.layers.{m}.lora_{part}" for m in modules for part in "ab"}
    else:
        frozen = ["feature_extractor.", "masked_spec_embed"]
        frozen += [f"encoder.layers.{i}." for i in range(first)]
        if freeze_prefix:
            frozen += ["feature_projection.", "encoder.pos_conv_embed."]
            frozen += ["encoder.layer_norm."] if family == "wav2vec2 base" else []
        whole = [name for name, _ in encoder.named_parameters()]
        names |= {f"encoder.{name}" for name in whole if not name.startswith(tuple(frozen))}
    gradients = step(model.train(), [*ragged(), torch.arange(10.0).view(5, 2)])
    assert set(models.trainable(model)) == gradients.keys() - {"predictions", "loss"} == names
    assert all(gradients[name].any() for name in names)


@torch.no_grad()
@pytest.mark.parametrize("family", ["wav2vec2 base", "wav2vec2 large"])
@every_row
def test_frozen_parts_stay_in_eval(method, layers, freeze_prefix, family):
    """After train() no module of a frozen part is in train mode: it computes the same twice, while
    the dropout of what is trained is on."""
    model, _ = tiny_model("exact", method, layers, freeze_prefix, family)
    encoder, first = model.train().encoder.encoder, DEPTH - (layers or DEPTH)
    front = [model.encoder.feature_projection, encoder.pos_conv_embed, encoder.dropout]
    front += [encoder.layer_norm] if family == "wav2vec2 base" else []
    trains_front = method != "lora" and not freeze_prefix
    frozen = [model.encoder.feature_extractor, *encoder.layers[:first]]
    frozen += [] if trains_front else front
    trained = [model.dropout, *encoder.layers[first:], *(front if trains_front else [])]
    assert not any(module.training for part in frozen for module in part.modules())
    assert all(module.training for part in trained for module in part.modules())
    hidden, frames = model.frozen(*ragged())
    assert torch.equal(hidden, model.frozen(*ragged())[0])
    assert not torch.equal(model.trained(hidden, frames), model.trained(hidden, frames))


@pytest.mark.parametrize(("kind", "shape", "counts"), COUNTS)
def test_counts(kind, shape, counts):
    """Real encoders (shapes only) have the published number of parameters, and each row trains its
    share: for wav2vec2-base the paper's."""
    config = getattr(transformers, f"{kind}Config")(**shape)
    found = []
    with torch.device("meta"):
        for row in ROWS:
            model = models.EmotionModel(transformers.AutoModel.from_config(config))
            total = sum(p.numel() for p in model.encoder.parameters())
            models.freeze(model, *row)
            found.append(sum(p.numel() for p in models.trainable(model).values()))
    assert [*found, total] == [int(count) for count in counts.split()]


def test_params_command(tmp_path, capsys):
    """`model.py params` prints those counts, without --model those of wav2vec2-base, from no file."""
    transformers.WavLMConfig().save_pretrained(tmp_path)
    for arguments, counts in (([], W2V2), (["--model", str(tmp_path)], WAVLM)):
        models.main(["params", *arguments])
        rows = [line.split()[2] for line in capsys.readouterr().out.splitlines()]
        assert rows == [f"{int(count):,}" for count in counts.split()[:-1]]


def write_old_layout(folder, lacking=None):
    """pytorch_model.bin as on the hub: Wav2Vec2ForPreTraining, weight norm as weight_g and
    weight_v."""
    config = tiny_config(num_codevectors_per_group=8, codevector_dim=16, proj_codevector_dim=16)
    model = transformers.Wav2Vec2ForPreTraining(config)
    weights = model.state_dict()
    for new, old in (("original0", "weight_g"), ("original1", "weight_v")):
        name = "wav2vec2.encoder.pos_conv_embed.conv."
        weights[name + old] = weights.pop(f"{name}parametrizations.weight.{new}")
    weights.pop(f"wav2vec2.{lacking}", None)
    torch.save(dict(weights), folder / "pytorch_model.bin")
    config.architectures = ["Wav2Vec2ForPreTraining"]
    config.save_pretrained(folder)
    transformers.Wav2Vec2FeatureExtractor(do_normalize=False, sampling_rate=8000).save_pretrained(
        folder
    )
    return model.wav2vec2.state_dict()


def test_old_checkpoint_layout(tmp_path):
    """A checkpoint in the hub's older layout loads completely and bitwise, with its own
    preprocessor's settings."""
    expected = write_old_layout(tmp_path)
    encoder, audio = models.load_encoder(str(tmp_path))
    loaded = encoder.state_dict()
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)
    assert audio == {"sample_rate": 8000, "normalise": False}


LACKING = ["encoder.pos_conv_embed.conv.weight_g", "encoder.layers.2.attention.q_proj.bias"]


@pytest.mark.parametrize("lacking", LACKING)
def test_missing_weight_is_an_error(lacking, tmp_path):
    """A checkpoint that lacks one weight is refused."""
    write_old_layout(tmp_path, lacking)
    with pytest.raises(ValueError, match="1 weights missing or misshapen"):
        models.load_encoder(str(tmp_path))


HUB_FLAGS = {  # of facebook/wav2vec2-base's config.json, with dropouts other than the defaults
    "gradient_checkpointing": True,
    "layerdrop": 1.0,
    "apply_spec_augment": True,
    "mask_time_prob": 0.9,
    "mask_time_length": 2,
    "mask_feature_prob": 0.9,
    "mask_feature_length": 2,
    "activation_dropout": 0.0,
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
    "feat_proj_dropout": 0.0,
    "freeze_feat_extract_train": True,
    "feat_quantizer_dropout": 0.0,
    "no_mask_time_overlap": False,
    "architectures": ["Wav2Vec2ForPreTraining"],
}


@pytest.mark.parametrize("family", ["wav2vec2 base", "wavlm base"])
def test_training_flags_are_not_obeyed(family, encoder, tmp_path):
    """With a config.json that asks for gradient checkpointing, layer drop and SpecAugment, a training
    step runs each layer once and gives what it gives in eval mode, as its dropouts are 0."""
    tiny_encoder(**FAMILIES[family]).save_pretrained(tmp_path)
    transformers.Wav2Vec2FeatureExtractor().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | HUB_FLAGS
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded, _ = models.load_encoder(str(tmp_path))
    model, calls = models.EmotionModel(loaded, dropout=0.0), []
    models.freeze(model, "full")
    for layer in loaded.encoder.layers:
        attention = layer.attention.forward
        layer.attention.forward = lambda *a, f=attention, **k: calls.append(f) or f(*a, **k)
    batch = (*ragged(), torch.arange(10.0).view(5, 2))
    trained = step(model.train(), batch)
    assert len(calls) == DEPTH
    assert relative(trained, step(model.eval(), batch)) < 1e-6


def test_loading_is_quiet(tmp_path, capfd):
    """Loading a checkpoint with heads of another task prints nothing."""
    write_old_layout(tmp_path)
    transformers.logging.set_verbosity_warning()
    transformers.logging.enable_progress_bar()
    capfd.readouterr()
    models.load_encoder(str(tmp_path))
    assert capfd.readouterr() == ("", "")


def test_identity(encoder):
    """Equal weights with another number of heads, another activation or dropout are another encoder;
    masked_spec_embed, which nothing uses, is no part of it, and one changed weight is."""
    base = models.identity(tiny_encoder())
    changes = [{"num_attention_heads": 2}, {"hidden_act": "relu"}, {"attention_dropout": 0.2}]
    assert len({base, *(models.identity(tiny_encoder(**change)) for change in changes)}) == 4
    changed = tiny_encoder()
    changed.masked_spec_embed.data += 1
    assert models.identity(changed) == base
    changed.encoder.layers[3].final_layer_norm.bias.data[0] += 1e-6
    assert models.identity(changed) != base


@pytest.fixture(scope="module", params=["partial", "lora"])
def run(request, launch, tmp_path_factory):
    """A run folder in exact padding and float32; steps so large that every trained part has
    moved."""
    folder = tmp_path_factory.mktemp("run")
    options = ["--method", request.param, "--layers", 2, "--epochs", 2, "--lr", 0.01]
    launch(folder, *options, "--padding", "exact")
    return folder


def test_saved_run_has_its_heads(run):
    """A loaded run holds all that was trained, heads included."""
    saved = torch.load(run / "best.pt", weights_only=True)["weights"]
    loaded = models.trainable(models.load_run(run)[0])
    assert {"head.weight", "head.bias"} < saved.keys() == loaded.keys()
    assert all(torch.equal(parameter, saved[name]) for name, parameter in loaded.items())


def test_predict_command(run, corpus, tmp_path, monkeypatch):
    """`model.py predict` gives, on both scales, what the run wrote for its test split."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # which rounds otherwise
    expected = read_csv(run / "predictions-Test1.csv")
    models.main(["predict", str(run), f"{corpus}/Audios", "--csv", str(tmp_path / "all.csv")])
    found = {row["FileName"]: row for row in read_csv(tmp_path / "all.csv")}
    assert len(expected) == 8 and len(found) == 28
    for row in expected:
        for scale in ("Act", "Val"):
            value, same = float(row[scale]), found[row["FileName"]]
            assert float(same[scale]) == pytest.approx(value, abs=1e-4)
            assert float(same[f"{scale}01"]) == pytest.approx((value - 1) / 6, abs=1e-5)


@torch.no_grad()
def test_export(run, corpus, tmp_path):
    """The exported folder is a regression model with named labels, LoRA merged, that gives Hugging
    Face the numbers that the run wrote for its test split."""
    models.main(["export", str(run), str(tmp_path / "out")])
    exported = transformers.AutoModelForAudioClassification.from_pretrained(tmp_path / "out").eval()
    extractor = transformers.AutoFeatureExtractor.from_pretrained(tmp_path / "out")
    assert exported.config.id2label == {0: "activation", 1: "valence"}
    assert exported.config.problem_type == "regression"
    assert not any("lora" in name for name in exported.state_dict())
    for row in read_csv(run / "predictions-Test1.csv"):
        wave = data.load_audio(f"{corpus}/Audios/{row['FileName']}")
        logits = exported(**extractor(wave, sampling_rate=16000, return_tensors="pt")).logits
        expected = [float(row["Act"]), float(row["Val"])]
        assert (1 + 6 * logits[0]).tolist() == pytest.approx(expected, abs=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("family", list(FAMILIES)[1:])
def test_export_of_every_family(family, launch, corpus, tmp_path):
    """Each family's run with LoRA exports to its own class of Hugging Face's, with the same numbers."""
    tiny_encoder(**FAMILIES[family]).save_pretrained(tmp_path / "encoder")
    transformers.Wav2Vec2FeatureExtractor(do_normalize=False).save_pretrained(tmp_path / "encoder")
    options = ["--method", "lora", "--lr", 0.01, "--model", tmp_path / "encoder"]
    launch(tmp_path / "run", *options)
    models.main(["export", str(tmp_path / "run"), str(tmp_path / "out")])
    exported = transformers.AutoModelForAudioClassification.from_pretrained(tmp_path / "out").eval()
    kind = FAMILIES[family].get("kind", "Wav2Vec2")
    assert type(exported).__name__ == f"{kind}ForSequenceClassification"
    model, audio = models.load_run(tmp_path / "run")
    utterances, _ = data.check_audio(data.read_corpus(corpus)[0][:3])
    for wave, _ in map(data.SpeechDataset(utterances, **audio).__getitem__, range(3)):
        expected = model(wave[None], [len(wave)])
        assert relative(exported(wave[None]).logits, expected) < 1e-5


def test_a_run_elsewhere(launch, encoder, tmp_path):
    """With --model a run is used where its encoder now lies; another encoder there is refused."""
    shutil.copytree(encoder, tmp_path / "first")
    launch(tmp_path / "run", "--model", tmp_path / "first")
    (tmp_path / "first").rename(tmp_path / "second")
    with pytest.raises(OSError, match="cannot load .*first"):
        models.load_run(tmp_path / "run")
    models.main(["export", str(tmp_path / "run"), str(tmp_path / "out"), "--model", encoder])
    tiny_encoder(num_attention_heads=2).save_pretrained(tmp_path / "second")
    with pytest.raises(ValueError, match="was trained from another encoder than .*second"):
        models.load_run(tmp_path / "run", str(tmp_path / "second"))
