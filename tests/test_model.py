"""The model of every family against Hugging Face's own forward on an untouched encoder, half
precision against float32, parameter counts of the paper, and checkpoints and runs in and out."""

import copy
import importlib.metadata
import json
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import transformers
from conftest import DEPTH, WIDTH, read_csv, relative, step, tiny_config, tiny_encoder, tree
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.rnn import pad_sequence

import ccc
import data
import model as models

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
# Rows of Table I, and what each trains of the real encoders, heads included; last, their size.
PARTIAL = [("partial", n, frozen) for frozen in (False, True) for n in (3, 2, 1)]
ROWS = [("full", None, False), *PARTIAL, ("lora", None, False)]
REAL_LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}
REAL_LARGE |= {"intermediate_size": 4096} | LARGE
W2V2 = "90172034 26381186 19293314 12205442 21265154 14177282 7089410 296450 94371712"
W2V2_LARGE = "311229570 46708866 34112642 21516418 37792770 25196546 12600322 788482 315438720"
WAVLM = "90182258 26382782 19294378 12205974 21266750 14178346 7089942 296450 94381936"
WAVLM_LARGE = "311247554 46710474 34113714 21516954 37794378 25197618 12600858 788482 315453120"
COUNTS = [(None, {}, W2V2), ("Hubert", {}, W2V2), ("WavLM", {}, WAVLM)]
COUNTS += [("Wav2Vec2", REAL_LARGE, W2V2_LARGE), ("Hubert", REAL_LARGE, W2V2_LARGE)]
COUNTS += [("WavLM", REAL_LARGE | {"conv_bias": False}, WAVLM_LARGE)]
# Of facebook/wav2vec2-base's config.json, larger, and what asks for other outputs; no dropout.
FLAGS = {"gradient_checkpointing": True, "layerdrop": 1.0, "apply_spec_augment": True}
FLAGS |= {"mask_time_prob": 0.9, "mask_time_length": 2, "mask_feature_prob": 0.9}
FLAGS |= {"mask_feature_length": 2, "output_attentions": True, "output_hidden_states": True}
FLAGS |= {"return_dict": False, "dtype": "float16", "torch_dtype": "float16"}
FLAGS |= {"freeze_feat_extract_train": True, "mask_channel_prob": 0.9, "final_dropout": 0.0}
FLASH = {"output_attentions": False, "_attn_implementation": "flash_attention_2"}
DROPOUTS = ["attention_dropout", "hidden_dropout", "activation_dropout", "feat_proj_dropout"]
FLAGS |= dict.fromkeys(DROPOUTS, 0.0)
RUNS = [("partial", "wav2vec2 base"), *(("lora", family) for family in FAMILIES)]
every_family = pytest.mark.parametrize("family", FAMILIES)


def freeze(model, *row, std=0.1, **options):
    """models.freeze, and random adapters: zero would hide what they do."""
    models.freeze(model, *row, **options)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_b"):
            nn.init.normal_(parameter, std=std)


def tiny_model(padding, *row, family="wav2vec2 base", **options):
    """(our model, {an untouched encoder of the same weights, a copy of the head}), in eval mode."""
    encoder = tiny_encoder(**FAMILIES[family])
    model = models.EmotionModel(copy.deepcopy(encoder), padding=padding, **options)
    freeze(model, *(row or ("full",)))
    return model.eval(), nn.ModuleDict({"encoder": encoder, "head": copy.deepcopy(model.head)})


def ragged():
    """Loud noise of 25 ms to 0.8 s, off zero, two of one length: wave (B, S), samples B ints,
    targets (B, A). What lies beyond the true lengths is not zero: it must not count."""
    samples = [9000, 4001, 12345, 400, 9000]
    generator = torch.Generator().manual_seed(0)
    wave = 1 + 3 * torch.randn(5, max(samples), generator=generator)
    return wave, samples, torch.arange(10.0).view(5, 2)


def extract(batch, normalise=True):
    """What Hugging Face's own feature extractor makes of each waveform alone: [(1, S)]."""
    extractor = transformers.Wav2Vec2FeatureExtractor(do_normalize=normalise)
    options = {"sampling_rate": 16000, "return_tensors": "pt"}
    rows = [row[:n].numpy() for row, n in zip(*batch[:2], strict=True)]
    return [extractor(row, **options).input_values for row in rows]


def hugging_face(reference, rows):
    """A head on the plain mean of the frames of Hugging Face's own forward of [(1, S)], padded."""
    wave = pad_sequence([row[0] for row in rows], batch_first=True)
    return reference.head(reference.encoder(wave).last_hidden_state.mean(1))


@torch.no_grad()
@every_family
def test_every_cut(family):
    """Cut at any stage, suffix(prefix(x)) is Hugging Face's forward behind its feature extractor:
    in paper padding that of the padded batch, in exact padding that of each waveform alone, which
    is not the same. The caller's wave stays as it was."""
    batch = ragged()
    for normalise in (True, False):
        rows = extract(batch, normalise)
        for padding in ("paper", "exact"):
            model, reference = tiny_model(padding, family=family, normalise=normalise)
            together = hugging_face(reference, rows)
            alone = torch.cat([hugging_face(reference, [row]) for row in rows])
            for model.cut in range(DEPTH + 1):
                hidden, frames = model.prefix(*batch[:2])
                assert hidden.shape[2] == (WIDTH if model.cut else 16)
                found = model.suffix(hidden, frames)
                assert relative(found, together if padding == "paper" else alone) < 1e-5
        assert relative(together, alone) > 1e-2
    assert torch.equal(batch[0], ragged()[0])


class PlusBA(nn.Module):
    """A weight W as W + 12 / 4 B A."""

    def __init__(self, lora):
        super().__init__()
        self.lora_a, self.lora_b = copy.deepcopy((lora.lora_a, lora.lora_b))

    def forward(self, weight):
        return weight + 3 * self.lora_b @ self.lora_a


@every_family
@pytest.mark.parametrize(("method", "layers"), [("full", None), ("lora", 2)])
def test_gradients(method, layers, family):
    """A step's predictions and gradients in paper padding are those of Hugging Face's forward: with
    LoRA, of that with W + alpha / rank B A for the weights of q and v, to which it merges."""
    model, reference = tiny_model("paper", family=family)
    freeze(model, method, layers, rank=4, alpha=12)
    for name, lora in model.encoder.named_modules():
        if isinstance(lora, models.LoRALinear):
            plain = reference.encoder.get_submodule(name)
            parametrize.register_parametrization(plain, "weight", PlusBA(lora))
            x = torch.randn(7, WIDTH)
            assert type(lora.merge()) is nn.Linear and relative(lora.merge()(x), plain(x)) < 1e-5
    batch = ragged()
    ours, predictions = step(model, batch), hugging_face(reference, extract(batch))
    ccc.ccc_loss(predictions, batch[2]).backward()
    assert relative(ours.pop("predictions"), predictions) < 1e-5
    parts = reference.named_parameters()
    parts = {name.replace("parametrizations.weight.0.", ""): part for name, part in parts}
    del ours["loss"]
    assert relative(ours, {name: parts[name].grad for name in ours}) < 1e-5


@every_family
@pytest.mark.parametrize("method", ["partial", "lora"])
def test_chunks_and_caches(family, method):
    """In exact padding chunks, recomputed, give the whole batch's predictions and gradients, and so
    does the suffix on what each utterance alone makes of the prefix: a cache."""
    model, _ = tiny_model("exact", method, 2, method == "partial", family=family)
    wave, samples, targets = batch = ragged()
    whole = step(model, batch)
    assert relative(step(model, batch, chunk=2, recompute=True), whole) < 1e-5
    single = [model.prefix(w[None, :n], [n])[0][0] for w, n in zip(wave, samples, strict=True)]
    cached = data.collate(zip(single, targets, strict=True))
    assert relative(step(model, cached, cached=True), whole) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("family", ["wav2vec2 base", "wavlm large"])
def test_paper_chunks_are_padded_to_the_batch(family):
    """In paper padding a chunk's predictions are the whole batch's, where it is as long as that;
    padded to its own longest they are not."""
    model, _ = tiny_model("paper", family=family)
    wave, samples, _ = ragged()
    whole = model(wave, samples)
    pairs = [model(wave[i : i + 2], samples[i : i + 2]) for i in (0, 2)]
    assert relative(torch.cat(pairs), whole[:4]) < 1e-5
    assert relative(model(wave[:2, :9000], samples[:2]), whole[:2]) > 1e-3


@torch.no_grad()
def test_frames():
    """count_frames is Hugging Face's count and what the CNN makes; 400 samples are the shortest."""
    model, reference = tiny_model("exact")
    for n in (400, 719, 720, 16000, 16079, 16080):
        made = reference.encoder.feature_extractor(torch.zeros(1, n)).shape[2]
        theirs = reference.encoder._get_feat_extract_output_lengths(n)
        assert theirs == made == model.count_frames(n)
    assert (model.count_frames(399), model.count_frames(400), data.MIN_SAMPLES) == (0, 1, 400)


@torch.no_grad()
def test_lora():
    """Before its first step a LoRA model's output is bitwise the base model's; rank, alpha and
    dropout are what was asked for, and dropout works on the adapter's input, in train mode only."""
    model, _ = tiny_model("exact")
    base = model(*ragged()[:2])
    models.freeze(model, "lora", rank=3, alpha=6, lora_dropout=0.5)
    assert torch.equal(model(*ragged()[:2]), base)
    lora = model.encoder.encoder.layers[0].attention.v_proj
    assert not models.LoRALinear(nn.Linear(9, 9)).base.weight.requires_grad
    assert (lora.lora_a.shape, lora.lora_b.shape) == ((3, WIDTH), (WIDTH, 3))
    lora.lora_a.copy_(torch.eye(3, WIDTH))
    lora.lora_b.copy_(torch.eye(WIDTH, 3))
    x = torch.ones(4000, WIDTH)
    update = (lora.train()(x) - lora.base(x)).round(decimals=4)
    assert set(update[:, :3].unique().tolist()) == {0, 4}  # alpha / rank, 0 or twice
    assert update[:, :3].mean().item() == pytest.approx(2, abs=0.1) and not update[:, 3:].any()
    update = (lora.eval()(x) - lora.base(x)).round(decimals=4)
    assert (update[:, :3] == 2).all()


def test_wrong_words():
    """What does not exist is refused by the class and by freeze: a padding, an encoder with parts
    that are not run, a method, a number of layers, none for partial, and adapters on adapters."""
    with pytest.raises(ValueError, match="excat"):
        tiny_model("excat")
    with pytest.raises(ValueError, match="add_adapter"):
        models.EmotionModel(tiny_encoder(add_adapter=True))
    for method, layers in [("partal", 2), *(("partial", n) for n in (5, 0, None)), ("full", 3)]:
        with pytest.raises(ValueError, match=method):
            tiny_model("exact", method, layers)
    with pytest.raises(ValueError, match="lora, 5 layers"):
        tiny_model("exact", "lora", 5)
    with pytest.raises(ValueError, match="adapters already"):
        models.freeze(tiny_model("exact", "lora", 2)[0], "lora")


@pytest.mark.parametrize("family", ["wav2vec2 base", "wavlm large"])
@pytest.mark.parametrize(("method", "layers", "frozen"), ROWS)
def test_what_is_trained(method, layers, frozen, family):
    """The trainable names are each row's, and a backward pass reaches all of them and nothing else.
    Frozen parts stay in eval mode, whether freeze comes before .train() or after: the prefix gives
    the same twice; and the head has its dropout. The cut is where a gradient must first arrive."""
    model, reference = tiny_model("exact", family=family, dropout=0.4)
    train_first = layers == 2
    model.train(train_first)
    model.requires_grad_(train_first)  # What was trained before does not matter.
    freeze(model, method, layers, frozen)
    if not train_first:
        model.train()
    layers = range(DEPTH - (layers or DEPTH), DEPTH)
    fixed = ["feature_extractor.", "masked_spec_embed"]
    fixed += [f"encoder.layers.{i}." for i in range(layers.start)]
    if frozen or method == "lora":
        fixed += ["feature_projection.", "encoder.pos_conv_embed.", "encoder.dropout."]
        fixed += ["encoder.layer_norm."] if family == "wav2vec2 base" else []  # else it is last
    fixed = tuple(f"encoder.{part}" for part in fixed)
    names = {n for n, _ in reference.named_parameters() if not n.startswith(fixed)}
    if method == "lora":
        modules = [f"encoder.encoder.layers.{i}.attention.{x}_proj" for i in layers for x in "qv"]
        names = {f"{m}.lora_{x}" for m in modules for x in "ab"} | {"head.weight", "head.bias"}
    batch = ragged()
    gradients = step(model, batch)
    assert set(models.trainable(model)) == gradients.keys() - {"predictions", "loss"} == names
    assert all(gradients[name].any() for name in names)
    for name, module in model.named_modules():
        assert module.training != f"{name}.".startswith(fixed)
    hidden, frames = model.prefix(*batch[:2])
    assert torch.equal(hidden, model.prefix(*batch[:2])[0]) and not hidden.requires_grad
    model.eval().dropout.train()
    assert not torch.equal(model.suffix(hidden, frames), model.suffix(hidden, frames))
    assert model.dropout.p == 0.4
    assert model.cut == (layers.start + 1 if frozen or method == "lora" else 0)


@pytest.mark.parametrize(("kind", "shape", "counts"), COUNTS)
def test_counts(kind, shape, counts, tmp_path, capsys):
    """`model.py params` counts from shapes alone what each row trains of a real encoder, and its
    share of all: without --model of wav2vec2-base, where the paper has the same numbers."""
    if kind:
        getattr(transformers, f"{kind}Config")(**shape).save_pretrained(tmp_path)
    models.main(["params", "--model", str(tmp_path)] if kind else ["params"])
    *counts, total = map(int, counts.split())
    lines = capsys.readouterr().out.splitlines()
    for line, (method, layers, frozen), count in zip(lines, ROWS, counts, strict=True):
        assert line.split()[:2] == [f"{count:,}", f"{count / total:.1%}"]
        assert f"{method} {layers or 'all'}" in line and frozen == ("frozen" in line)


# ---- half precision ----


def long_batch():
    """Noise of four colours, 10.2 s and less: 2,000 frames in paper padding."""
    samples = [163840, 163000, 150000, 90000]
    generator = torch.Generator().manual_seed(0)
    spectra = torch.fft.rfft(torch.randn(4, samples[0], generator=generator))
    distances = torch.linspace(0, 1, spectra.shape[1]) - torch.linspace(0.1, 0.6, 4)[:, None]
    wave = torch.fft.irfft(spectra * (torch.exp(-((distances / 0.1) ** 2)) + 0.02), samples[0])
    return wave, samples


@every_family
def test_half_precision(family):
    """bfloat16 on a CPU: every gradient of every row, cached too, is within 10 % of float32's in
    norm, or of a thousandth of the largest one's where its own is smaller (k_proj.bias: zero by
    mathematics). The partial rows' gradients, dropout off, are some of full's."""
    batch = long_batch()
    shape = {"hidden_size": 64, "num_hidden_layers": 3, "initializer_range": 0.05}
    encoder = tiny_encoder(**FAMILIES[family] | shape)
    for row, padding in (ROWS[0], "exact"), (ROWS[-1], "paper"), (ROWS[4], "exact"):
        model = models.EmotionModel(copy.deepcopy(encoder), padding=padding).eval()
        freeze(model, *row, std=0.05)
        if row[2]:
            batch = model.prefix(*batch)
        # Targets that go with the predictions, some way off: else the loss is what is sensitive.
        with torch.no_grad():
            targets = 0.3 + 0.5 * (model.suffix if row[2] else model)(*batch)
        run = partial(step, model, (*batch, targets), cached=row[2])
        whole, half = run(), run(precision="bf16")
        assert not torch.equal(half.pop("predictions"), whole.pop("predictions"))
        del whole["loss"]
        largest = max(gradient.norm() for gradient in whole.values())
        for name, gradient in whole.items():
            wrong = (half[name] - gradient).norm() / max(gradient.norm(), largest / 1000)
            assert wrong < 0.1, f"{row} {name}: {wrong:.3f}"


@torch.no_grad()
def test_predictions_are_not_rounded():
    """Under autocast pooling and head are in float32: the predictions are what the head makes in
    float64 of the same hidden states, and not rounded to the 8 bits of bfloat16."""
    model, reference = tiny_model("exact")
    states = []
    model.encoder.encoder.layers[-1].register_forward_hook(
        lambda *hook: states.append(models.first_of(hook[2]))
    )
    wave, samples, _ = ragged()
    with torch.autocast("cpu", torch.bfloat16):
        found = model(wave, samples)
    for hidden, n, row in zip(states[0].double(), samples, found, strict=True):
        expected = reference.head.double()(hidden[: model.count_frames(n)].mean(0))
        assert relative(row.double(), expected) < 1e-5
    assert found.dtype == torch.float32 and not torch.equal(found.bfloat16().float(), found)


# ---- loading an encoder ----


def amend(path, entries):
    """Other entries in a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def write_encoder(folder, family, flags, normalise=True):
    """A tiny encoder's folder, with more entries in its config.json -> the encoder."""
    encoder = tiny_encoder(**FAMILIES[family])
    encoder.save_pretrained(folder)
    transformers.Wav2Vec2FeatureExtractor(do_normalize=normalise).save_pretrained(folder)
    amend(folder / "config.json", flags)
    return encoder


def write_old_layout(folder, lacking=None):
    """pytorch_model.bin as on the hub: Wav2Vec2ForPreTraining, with weight_g and weight_v."""
    config = tiny_config(num_codevectors_per_group=8, codevector_dim=16, proj_codevector_dim=16)
    model = transformers.Wav2Vec2ForPreTraining(config)
    weights = model.state_dict()
    for new, old in (("original0", "weight_g"), ("original1", "weight_v")):
        name = "wav2vec2.encoder.pos_conv_embed.conv."
        weights[name + old] = weights.pop(f"{name}parametrizations.weight.{new}")
    weights.pop(f"wav2vec2.{lacking}", None)
    torch.save(dict(weights), folder / "pytorch_model.bin")
    config.save_pretrained(folder)
    sound = transformers.Wav2Vec2FeatureExtractor(do_normalize=False, sampling_rate=8000)
    sound.save_pretrained(folder)
    return model.wav2vec2.state_dict()


def test_old_checkpoint_layout(tmp_path, capfd, caplog, monkeypatch):
    """A checkpoint in the hub's older layout, with heads of another task, loads completely, bitwise
    and quietly, with its own preprocessor's settings; masked_spec_embed may be lacking."""
    expected = write_old_layout(tmp_path, "masked_spec_embed")
    transformers.logging.set_verbosity_warning()
    transformers.logging.enable_progress_bar()
    monkeypatch.setattr(transformers.logging.get_logger(), "propagate", True)  # to caplog
    encoder, audio = models.load_encoder(str(tmp_path))
    assert capfd.readouterr() == ("", "") and not caplog.records
    found = encoder.state_dict()
    del found["masked_spec_embed"], expected["masked_spec_embed"]
    assert relative(found, expected) == 0
    assert audio == {"sample_rate": 8000, "normalise": False}


NO_ENCODER = [  # a file in an encoder's folder, what is changed in it, and what is said of that
    ("config.json", {"model_type": "whisper"}, "whisper.* not a plain one"),
    ("config.json", {"model_type": "bert"}, "bert.* not a plain one"),
    ("config.json", {"model_type": "data2vec-audio"}, "data2vec-audio.* not a plain one"),
    ("config.json", {"add_adapter": True}, "add_adapter.* not a plain one"),
    ("config.json", {"model_type": "hubert", "conv_pos_batch_norm": True}, "norm.*not a plain one"),
    ("config.json", {"hidden_size": "wide"}, "cannot be used"),  # an error of several lines
    ("config.json", "[1, 2]", "cannot be used"),
    ("adapter_config.json", "{}", "adapter_config.json: merge"),
    (".", None, "no folder"),
]
NOT_LOADED = [("config.json", {"conv_kernel": (11, 3, 3, 3, 3, 2, 2)}, "misshapen|cannot be used")]
NOT_LOADED += [("preprocessor_config.json", None, "cannot be used")]
for rate in (None, [16000], 1e20, 0, "16000"):
    NOT_LOADED += [("preprocessor_config.json", {"sampling_rate": rate}, "is not in Hz")]


@pytest.mark.parametrize(("name", "change", "reason"), NO_ENCODER + NOT_LOADED)
def test_refused(name, change, reason, encoder, tmp_path):
    """What no row can be trained from is refused in one line that names the folder, when it is
    loaded, and where its configuration says so, before that by `params --model`."""
    folder = tmp_path / "encoder"
    shutil.copytree(encoder, folder)
    if isinstance(change, dict):
        amend(folder / name, change)
    elif change:
        (folder / name).write_text(change)
    else:
        shutil.rmtree(folder) if name == "." else (folder / name).unlink()
    calls = [models.load_encoder, lambda name: models.main(["params", "--model", name])]
    for call in calls if (name, change, reason) in NO_ENCODER else calls[:1]:
        with pytest.raises((ValueError, OSError), match=reason) as caught:
            call(str(folder))
        assert f"'{folder}'" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("lacking", ["pos_conv_embed.conv.weight_g", "layers.2.layer_norm.bias"])
def test_missing_weight_is_an_error(lacking, tmp_path):
    """A checkpoint that lacks one weight is refused, by transformers 4.57 itself at times."""
    write_old_layout(tmp_path, f"encoder.{lacking}")
    with pytest.raises(ValueError, match="1 weights missing|cannot be used"):
        models.load_encoder(str(tmp_path))


def test_older_transformers_is_refused(encoder, monkeypatch):
    """A transformers before 4.57 is refused with what is required."""
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "4.56.2")
    with pytest.raises(ValueError, match="transformers>=4.57 is required.* found .*4.56.2"):
        models.load_encoder(encoder)


@pytest.mark.parametrize("family", ["wav2vec2 base", "wavlm base", "hubert large"])
@pytest.mark.parametrize("flags", [{}, FLASH])
def test_running_flags_are_not_obeyed(flags, family, tmp_path):
    """With a config.json that asks for checkpointing, layer drop, SpecAugment, other outputs and
    another attention, a step in train mode runs each layer once and gives what the untouched
    encoder's in eval mode does, as its dropouts are 0."""
    written = write_encoder(tmp_path, family, FLAGS | flags)
    encoder, audio = models.load_encoder(str(tmp_path))
    model, calls = models.EmotionModel(encoder, dropout=0.0, **audio), []
    models.freeze(model, "full")
    for layer in encoder.encoder.layers:
        layer.attention.q_proj.register_forward_hook(lambda *_: calls.append(1))
    trained = step(model.train(), ragged())
    assert len(calls) == DEPTH
    reference = nn.ModuleDict({"encoder": written, "head": model.head})
    expected = hugging_face(reference, extract(ragged()))
    assert relative(trained["predictions"], expected) < 1e-5
    assert relative(trained, step(model.eval(), ragged())) < 1e-6
    for layer in encoder.encoder.layers:
        layer.attention.dropout = 0.5  # what is obeyed: in training only
    assert relative(step(model.train(), ragged()), trained) > 1e-3


def test_digest():
    """Equal weights with another configuration that changes a number are another encoder, and so is
    one changed weight; masked_spec_embed, which nothing uses, is no part of it."""
    changes = [{}, {"num_attention_heads": 2}, {"layer_norm_eps": 1e-3}, {"hidden_act": "relu"}]
    changes += [{"conv_stride": (5, 2, 2, 2, 2, 2, 1)}, {"feat_extract_activation": "relu"}]
    changes += [{"feat_extract_norm": "layer"}, {"do_stable_layer_norm": True}]
    changes += [{"model_type": "unispeech"}, {"max_bucket_distance": 90}]
    changes += [{name: 0.3} for name in DROPOUTS]
    encoder = tiny_encoder(kind="WavLM")
    found = []
    for change in changes:
        changed = copy.deepcopy(encoder)  # equal weights, even where the class has others
        changed.config.update(change)
        found.append(models.digest(changed))
    found.append(models.digest(tiny_encoder()))
    assert len(set(found)) == len(found) == 15
    encoder.masked_spec_embed.data += 1
    assert models.digest(encoder) == found[0]
    encoder.encoder.layers[3].final_layer_norm.bias.data[0] += 1e-6
    assert models.digest(encoder) not in found


# ---- what it takes ----

WRONG = {  # what is given for a wave of two times 900 samples and their lengths
    "an array": (lambda wave: (wave.numpy(), [900, 900]), "true lengths"),
    "a mask": (lambda wave: (wave, torch.ones(2, 900).long()), "true lengths"),
    "a tensor": (lambda wave: (wave, torch.tensor([900, 900])), "true lengths"),
    "shares": (lambda wave: (wave, [1.0, 0.5]), "true lengths"),
    "beyond": (lambda wave: (wave, [900, 901]), "true lengths"),
    "empty": (lambda wave: (wave, [900, 0]), "true lengths"),
    "too few": (lambda wave: (wave, [900]), "true lengths"),
    "no batch": (lambda wave: (wave[0], [900]), "true lengths"),
    "no frame": (lambda wave: (wave[:, :399], [399, 399]), "shorter than one frame"),
}


@pytest.mark.parametrize("case", WRONG)
@pytest.mark.parametrize("padding", ["paper", "exact"])
def test_wrong_batches(case, padding):
    """Inputs that are no tensor, lengths that are not B ints within it, and waveforms too short for
    one frame are one clear error."""
    make, reason = WRONG[case]
    with pytest.raises(ValueError, match=reason):
        tiny_model(padding)[0](*make(torch.zeros(2, 900)))


@torch.no_grad()
def test_another_pool():
    """A subclass may pool in another way, with the mask of true frames."""

    class Last(models.EmotionModel):
        def pool(self, hidden, mask):
            return torch.stack([row[true][-1] for row, true in zip(hidden, mask, strict=True)])

    encoder = tiny_encoder()
    model = Last(copy.deepcopy(encoder), padding="exact").eval()
    states = [encoder(row).last_hidden_state[:, -1] for row in extract(ragged())]
    assert relative(model(*ragged()[:2]), model.head(torch.cat(states))) < 1e-5


def test_loop_of_ones_own():
    """The model and the loss in a plain loop learn a batch by heart. Before freeze, too, the CNN is
    frozen, and an encoder's checkpointing is off."""
    encoder = tiny_encoder()
    for layer in encoder.encoder.layers:
        layer.gradient_checkpointing = True
    model = models.EmotionModel(encoder, padding="exact", dropout=0.0)
    assert not any("feature_extractor" in name for name in models.trainable(model))
    assert not any(layer.gradient_checkpointing for layer in encoder.encoder.layers)
    models.freeze(model, "partial", 2)
    wave, samples, targets = ragged()
    optimizer = torch.optim.AdamW(models.trainable(model).values(), lr=3e-3)
    model.train()
    for _ in range(30):
        loss = ccc.ccc_loss(model(wave, samples), targets / 10)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.4


FULL = [MemoryError(), torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("ALLOC_FAILED")]


@pytest.mark.parametrize("error", [*FULL, RuntimeError("shapes differ")], ids=repr)
def test_explain_memory(error):
    """Full memory, with words or without, is an error with advice; others stay as they are."""
    expected = (MemoryError, "out of memory: less") if error in FULL else (RuntimeError, "differ")
    with pytest.raises(expected[0], match=expected[1]), models.explain_memory("less"):
        raise error


# ---- runs ----


@pytest.fixture(scope="module", params=RUNS, ids=", ".join)
def run(request, launch, tmp_path_factory):
    """A run in exact padding and float32; steps so large that every trained part has moved."""
    (method, family), folder = request.param, tmp_path_factory.mktemp("run")
    write_encoder(folder / "encoder", family, FLAGS, normalise=family != "wavlm base")
    options = ["--method", method, "--lr", 0.01, "--padding", "exact", "--dropout", 0.3]
    if method == "lora":
        options += ["--rank", 4, "--alpha", 12, "--lora-dropout", 0.4]
    launch(folder, *options, "--model", folder / "encoder")
    return folder


@pytest.fixture(scope="module")
def small(launch, tmp_path_factory):
    """A run of the paper's padding, of the last layer."""
    folder = tmp_path_factory.mktemp("run")
    launch(folder, "--layers", 1)
    return folder


def predict(run, *options):
    models.main(["predict", str(run), "--device", "cpu", *map(str, options)])


@pytest.fixture
def score(tmp_path):
    """score(run, *options): the rows that `predict` writes to scores.csv."""

    def predict_rows(run, *options):
        path = tmp_path / "scores.csv"
        path.unlink(missing_ok=True)
        predict(run, *options, "--csv", path)
        return read_csv(path)

    return predict_rows


def test_saved_run(run, corpus, score):
    """A run's best.pt holds all that was trained, heads included, and the model is rebuilt as the
    run's arguments say; `predict` makes of it what the run wrote for its test split."""
    saved = torch.load(run / "best.pt", weights_only=True)["weights"]
    assert {"head.weight", "head.bias"} < saved.keys()
    model = models.load_run(run)
    assert relative(models.trainable(model), saved) == 0 and not model.training
    sound = json.loads((run / "encoder" / "preprocessor_config.json").read_text())
    assert (model.sample_rate, model.normalise) == (sound["sampling_rate"], sound["do_normalize"])
    assert model.dropout.p == 0.3
    for lora in [m for m in model.modules() if isinstance(m, models.LoRALinear)]:
        assert (len(lora.lora_a), lora.scale, lora.dropout.p) == (4, 3, 0.4)
    found = {row["FileName"]: row for row in score(run, f"{corpus}/Audios")}
    expected = {row["FileName"]: row for row in read_csv(run / "predictions-Test1.csv")}
    assert (len(expected), len(found)) == (8, 28)
    for name in expected:
        for column in ("Act", "Val"):
            value = float(expected[name][column])
            assert float(found[name][column]) == pytest.approx(value, abs=1e-4)


@pytest.mark.parametrize("cached", [False, True])
def test_another_sample_rate(cached, encoder, launch, corpus, score, tmp_path):
    """An encoder that was trained at 8 kHz gets that: in training, from a cache, and in `predict`
    the predictions are those of the sound at 8 kHz."""
    shutil.copytree(encoder, tmp_path / "encoder")
    path = tmp_path / "encoder" / "preprocessor_config.json"
    path.write_text(path.read_text().replace("16000", "8000"))
    options = ["--model", path.parent, "--padding", "exact", "--layers", 3]
    launch(tmp_path / "run", *options, *["--cache", tmp_path / "cache"][: 2 * cached])
    model = models.load_run(tmp_path / "run")
    for rows in (read_csv(tmp_path / "run/predictions-Test1.csv"), score(tmp_path / "run", corpus)):
        for row in rows[-8:]:
            wave = data.load_audio(f"{corpus}/Audios/{Path(row['FileName']).name}", 8000)
            units = model(torch.from_numpy(wave)[None], [len(wave)])[0]
            found = [(float(row[column]) - 1) / 6 for column in ("Act", "Val")]
            assert found == pytest.approx(units.tolist(), abs=5e-3 if cached else 1e-4)


@torch.no_grad()
def test_export(run, corpus, score, tmp_path):
    """What `predict` says is what the exported folder says, LoRA merged: its family's class of
    Hugging Face's behind its own feature extractor, alone and, but for a CNN that normalises over
    time, batched; and its pipeline. Nothing of config.json that is about running is exported."""
    models.main(["export", str(run), str(tmp_path / "out")])
    rows = score(run, f"{corpus}/Audios")[:6]
    expected = torch.tensor([[(float(r[c]) - 1) / 6 for c in ("Act", "Val")] for r in rows])
    waves = [soundfile.read(f"{corpus}/Audios/{r['FileName']}", dtype="float32")[0] for r in rows]
    auto, folder = transformers.AutoModelForAudioClassification, tmp_path / "out"
    exported = auto.from_pretrained(folder).eval()
    extractor = transformers.AutoFeatureExtractor.from_pretrained(folder)
    read = partial(extractor, sampling_rate=16000, return_tensors="pt", padding=True)
    alone = torch.cat([exported(**read(wave)).logits for wave in waves])
    torch.testing.assert_close(alone, expected, atol=2e-6, rtol=2e-5)
    if exported.config.feat_extract_norm == "layer":
        together = exported(**read(waves)).logits
        torch.testing.assert_close(together, expected, atol=2e-6, rtol=2e-5)
    pipe = transformers.pipeline("audio-classification", str(folder))
    for wave, row in zip(waves, expected.tolist(), strict=True):
        found = pipe(wave, function_to_apply="none", top_k=None)
        scores = {one["label"]: one["score"] for one in found}
        assert scores == pytest.approx(dict(zip(("activation", "valence"), row)), abs=1e-5)
    assert exported.config.problem_type == "regression"
    running = ("gradient_checkpointing", "layerdrop", "apply_spec_augment", "output_attentions")
    running += ("output_hidden_states",)
    assert not any(getattr(exported.config, key, False) for key in running)


def test_exported_exact_base(launch, tmp_path):
    """Of a CNN that normalises over time, an exact run's files are to be scored alone, too."""
    launch(tmp_path / "run", "--padding", "exact")
    models.main(["export", str(tmp_path / "run"), str(tmp_path / "out")])
    assert "Score each file alone" in (tmp_path / "out/README.md").read_text()
    sound = json.loads((tmp_path / "out/preprocessor_config.json").read_text())
    assert sound["return_attention_mask"] is False


def test_exported_folder(small, encoder, tmp_path, monkeypatch):
    """The README.md of the folder names attributes, scale, padding, test CCCs and encoder. A folder
    that holds files is refused and kept, and an export that fails leaves nothing."""
    export = partial(models.main, ["export", str(small), str(tmp_path / "out")])
    export()
    card = (tmp_path / "out" / "README.md").read_text()
    score = json.loads((small / "result.json").read_text())["test"]["valence"]
    words = ["activation, valence", "1 to 7", "paper padding", encoder, str(score)]
    words += [str(tmp_path / "out"), "Score each file alone"]
    assert [word for word in words if word not in card] == []
    before = tree(tmp_path)
    with pytest.raises((ValueError, OSError), match="out"):
        export()
    assert tree(tmp_path) == before
    shutil.rmtree(tmp_path / "out")

    def fail(*_):
        raise OSError("the disk is full")

    monkeypatch.setattr(transformers.Wav2Vec2FeatureExtractor, "save_pretrained", fail)
    with pytest.raises(OSError, match="disk is full"):
        export()
    assert not list(tmp_path.iterdir())


def test_a_run_elsewhere(small, encoder, tmp_path):
    """With --model a run is used where its encoder now lies, not where it lay; another encoder
    there is refused, and so is best.pt of another method or number of layers."""
    run = tmp_path / "run"
    shutil.copytree(small, run)
    amend(run / "config.json", {"model": str(tmp_path / "first")})
    with pytest.raises(ValueError, match="first .no folder here"):
        models.load_run(run)
    shutil.copytree(encoder, tmp_path / "second")
    assert models.load_run(run, str(tmp_path / "second")).scale == [1, 7]
    best = torch.load(run / "best.pt", weights_only=True)
    for change in ({"method": "lora"}, {"layers": 2}, {"freeze_embedding": True}):
        torch.save(best | {"settings": best["settings"] | change}, run / "best.pt")
        amend(run / "config.json", best["settings"] | change)
        with pytest.raises(ValueError, match="best.pt.* another method or number of layers"):
            models.load_run(run, encoder)
    settings = best["settings"] | {"scale": [1, 5]}
    torch.save(best | {"settings": settings}, run / "best.pt")
    amend(run / "config.json", settings)
    assert models.load_run(run, encoder).scale == [1, 5]
    torch.save([best], run / "best.pt")
    with pytest.raises(ValueError, match="best.pt' cannot be used"):
        models.load_run(run, encoder)
    torch.save(best, run / "best.pt")
    amend(run / "config.json", best["settings"])
    tiny_encoder(num_attention_heads=2).save_pretrained(tmp_path / "second")
    with pytest.raises(ValueError, match="trained from another encoder than .*second"):
        models.load_run(run, str(tmp_path / "second"))


# ---- predict ----


def test_windows(small, score, tmp_path):
    """--window and --hop give a row a piece, with Start and End: what the cut-out piece alone gets.
    A piece goes on to the recording's end, and a rest under .1 s is left out."""
    sound = np.random.default_rng(0).normal(0, 0.1, 40800).astype(np.float32)  # 2.55 s
    soundfile.write(tmp_path / "long.wav", sound, 16000, "FLOAT")
    rows = score(small, tmp_path / "long.wav", "--window", 1, "--hop", 0.5)
    times = [(float(row["Start"]), float(row["End"])) for row in rows]
    assert times == [(0, 1), (0.5, 1.5), (1, 2), (1.5, 2.5)]
    for k, (start, end) in enumerate(times):
        piece = sound[round(start * 16000) : round(end * 16000)]
        soundfile.write(tmp_path / f"{k}.wav", piece, 16000, "FLOAT")
        (alone,) = score(small, tmp_path / f"{k}.wav")
        assert [alone["Act"], alone["Val"]] == [rows[k]["Act"], rows[k]["Val"]]
    for seconds, ends in ((2.65, [1, 2, 2.65]), (0.3, [0.3])):
        soundfile.write(tmp_path / "cut.wav", np.resize(sound, round(seconds * 16000)), 16000)
        rows = score(small, tmp_path / "cut.wav", "--window", 1)
        assert [(float(row["Start"]), float(row["End"])) for row in rows] == [*enumerate(ends)]
    soundfile.write(tmp_path / "minute.wav", np.resize(sound, 61 * 16000), 16000)
    assert len(score(small, tmp_path / "minute.wav", "--window", 20)) == 4
    for wrong in (["--hop", 1], ["--window", 1, "--hop", 2], ["--window", -1], ["--window", "inf"]):
        with pytest.raises(SystemExit):
            predict(small, tmp_path / "long.wav", *wrong)


def test_bad_files_do_not_stop_it(small, corpus, tmp_path, capfd, monkeypatch):
    """`predict` goes on past a file that cannot be used: a line on stderr each, status 1. Notes
    there name silence, and say that a paper run was trained in padded batches."""
    for name in ("1.wav", "3.wav", "secret.wav"):
        shutil.copy(min(Path(corpus, "Audios").glob("*.wav")), tmp_path / name)
    (tmp_path / "2.wav").write_bytes(b"no sound")
    (tmp_path / "0.wav").symlink_to("gone.wav")
    soundfile.write(tmp_path / "4.wav", np.zeros(8000), 16000)

    def guarded(path, *args, **options):
        if str(path).endswith("secret.wav"):
            raise PermissionError(13, "Permission denied", path)
        return open(path, *args, **options)

    monkeypatch.setattr(data, "open", guarded, raising=False)
    with pytest.raises(SystemExit) as left:
        predict(small, tmp_path)
    out, err = capfd.readouterr()
    assert err.count("Permission denied: ") == err.count("secret.wav") == 1
    assert left.value.code == 1 and err.count("2.wav") == err.count("0.wav") == 1
    assert err.count("constant sound") == err.count("4.wav") == err.count("padded batches") == 1
    names = ["FileName", "1.wav", "3.wav", "4.wav"]
    assert [line.split(",")[0] for line in out.splitlines()] == names
    with pytest.raises(SystemExit, match="1"):
        predict(small, tmp_path / "none.wav", tmp_path / "1.wav")
    out, err = capfd.readouterr()
    assert err.count("No such file") == err.count("none.wav") == 1 and len(out.splitlines()) == 2


def test_full_memory_is_a_line(small, corpus, tmp_path, monkeypatch):
    """Where a file needs more memory than there is, `predict` names it and says what needs less;
    what it had predicted by then is kept."""
    forward = models.EmotionModel.forward
    calls = []

    def full(model, wave, samples):
        calls.append(samples)
        if len(calls) == 2:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return forward(model, wave, samples)

    monkeypatch.setattr(models.EmotionModel, "forward", full)
    with pytest.raises(MemoryError, match="out of memory: '.*wav' needs --window"):
        predict(small, Path(corpus, "Audios"), "--csv", tmp_path / "scores.csv")
    assert len(read_csv(tmp_path / "scores.csv")) == 1


def test_csv_overwrites_nothing(small, corpus, tmp_path, capsys):
    """--csv takes the name of a new file: a label file, a recording and earlier predictions stay as
    they are, and a line says so."""
    shutil.copytree(corpus, tmp_path, dirs_exist_ok=True)
    sound = min(tmp_path.glob("Audios/*.wav"))
    predict(small, sound, "--csv", tmp_path / "own.csv")
    assert len(read_csv(tmp_path / "own.csv")) == 1
    before = tree(tmp_path)
    for path in (tmp_path / "Labels/labels_consensus.csv", sound, tmp_path / "own.csv"):
        with pytest.raises(SystemExit):
            predict(small, sound, "--csv", path)
        assert f"'{path}' is there already" in capsys.readouterr().err
    assert tree(tmp_path) == before


def test_predict_a_split(small, corpus, score, tmp_path, capfd):
    """--data and --split write the labels on the run's scale, 1 to 7: as they are where --scale is
    left out, and mapped where they are from 1 to 5. A line and status 1 tell of rows without usable
    ones. ccc.py scores the file. --data with files, and its options without it, are refused."""
    expected = score(small, "--data", corpus, "--split", "Development")
    rows = read_csv(f"{corpus}/Labels/labels_consensus.csv")
    rows = [row for row in rows if row["Split_Set"] == "Development"]
    lines = ["FileName,EmoAct,EmoVal,SpkrID,Split_Set"]
    for row, scored in zip(rows, expected, strict=True):
        labels = [float(row["EmoAct"]), float(row["EmoVal"])]
        assert [float(scored["EmoAct"]), float(scored["EmoVal"])] == pytest.approx(labels, abs=1e-5)
        act, val = (1 + (label - 1) * 4 / 6 for label in labels)
        lines.append(f"{row['FileName']},{act:.6f},{val:.6f},1,Test2")
    shutil.copytree(corpus, tmp_path, dirs_exist_ok=True)
    lines.append("bad.wav,9,9,1,Test2")
    (tmp_path / "Labels/labels_consensus.csv").write_text("\n".join(lines))
    options = ["--data", tmp_path, "--split", "Test2", "--scale", 1, 5]
    with pytest.raises(SystemExit, match="1"):
        score(small, *options)
    for row, other in zip(read_csv(tmp_path / "scores.csv"), expected, strict=True):
        assert row.pop("FileName") == other.pop("FileName") and row["Act"] == other["Act"]
        numbers = {key: float(value) for key, value in other.items()}
        assert {key: float(row[key]) for key in row} == pytest.approx(numbers, abs=1e-5)
    assert "skipped: 1 " in capfd.readouterr().err
    ccc.main([str(tmp_path / "scores.csv")])
    assert capfd.readouterr().out.startswith("n 8  Act ")
    alone = options[2:4], options[4:]
    for wrong in ([corpus, *options], [], *([corpus, *line] for line in alone)):
        with pytest.raises(SystemExit):
            predict(small, *wrong)
