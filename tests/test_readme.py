"""What README.md shows is so: its Python runs, its command lines are understood, and its loop over
the rows of Table I may be run again."""

import inspect
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import soundfile
from conftest import fork

import train

ROOT = Path(train.__file__).parent
SIX = {"ccc", "model", "cache", "data", "train", "stats"}
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n((?s:.*?))^```", README, re.MULTILINE)
PYTHON = [code for language, code in BLOCKS if language == "python"]
LOOP = next(code for _, code in BLOCKS if code.startswith("(trap"))
LINES = re.findall(
    r"(?:^|(?<=`)|# then: )((?:python|torchrun) .*?\.py[^`|#\n]*)", README, re.MULTILINE
)
LINES += [f"train.py --data x --out x {row}" for row in re.findall(r"\| `(--.* .*)` \|", README)]


@pytest.fixture(scope="module")
def demo(corpus, encoder, launch, tmp_path_factory):
    """A folder as after the demo, tiny, with a table of ratings 1 to 5 of recordings."""
    root = tmp_path_factory.mktemp("demo")
    shutil.copytree(corpus, root / "demo/corpus")
    shutil.copytree(encoder, root / "demo/corpus/encoder")
    launch(root / "demo/run", "--padding", "exact")
    (root / "recordings").mkdir()
    rows = ["FileName,arousal,pleasure,speaker"]
    for i, path in enumerate(sorted(Path(corpus, "Audios").iterdir())):
        soundfile.write(root / f"recordings/{path.stem}.flac", *soundfile.read(path))
        rows.append(f"{path.stem}.flac,{1 + i % 5},{5 - i % 4},s{i % 10}")
    (root / "ratings.csv").write_text("\n".join(rows))
    return root


def run_alone(path):
    """In a child: run a file as a new process would, with no project file but those beside it."""
    for name in SIX & sys.modules.keys():
        del sys.modules[name]
    sys.path = [str(path.parent), *(folder for folder in sys.path if Path(folder) != ROOT)]
    os.chdir(path.parent)
    runpy.run_path(path)
    found = [Path(sys.modules[name].__file__) for name in SIX & sys.modules.keys()]
    assert all(module.parent == path.parent for module in found)


@pytest.mark.parametrize("code", PYTHON, ids=lambda code: code.splitlines()[0][2:])
def test_python(code, demo, tmp_path, monkeypatch):
    """Each snippet runs with copies of only those files that it imports and what they import."""
    for name in re.findall(r"^from (ccc|model|cache|data) import", code, re.MULTILINE):
        shutil.copy(ROOT / f"{name}.py", tmp_path)
    for path in demo.iterdir():
        (tmp_path / path.name).symlink_to(path)
    snippet = tmp_path / "snippet.py"
    snippet.write_text(code)
    process = fork(run_alone, snippet)
    process.join()
    assert process.exitcode == 0
    monkeypatch.chdir(tmp_path)
    for line in re.findall(r"# then: python (.*)", code):  # a corpus of one's own, to a trained run
        script, *words = shlex.split(line)
        if script == "train.py":
            tiny = f"--model {demo}/demo/corpus/encoder --epochs 1 --batch-size 4 --precision fp32"
            words += tiny.split()
        __import__(Path(script).stem).main(words)
        assert script != "train.py" or (tmp_path / "runs/mine/result.json").exists()


def test_predict_batch_alone(tmp_path):
    """The text of train.predict_batch alone, with any model of a prefix and a suffix."""
    code = "import torch\nfrom torch.utils.checkpoint import checkpoint\n"
    code += inspect.getsource(train.predict_batch)
    code += """
from types import SimpleNamespace
model = torch.nn.Linear(16, 2)
model.suffix = lambda hidden, frames: model(hidden.mean(1))
args = SimpleNamespace(device="cpu", cached=True, recompute=True)
chunks = [(torch.randn(4, 9, 16), [9] * 4), (torch.randn(4, 30, 16), [30] * 4)]
predict_batch(model, chunks, args).var().backward()
assert model.weight.grad.any()
"""
    snippet = tmp_path / "snippet.py"
    snippet.write_text(code)
    runpy.run_path(snippet)


def run_loop(folder, corpus, encoder):
    """The shell's expansion of README's loop at tiny size, each line run in this process."""
    loop = LOOP.replace("0 1 2 3 4", "0 1").replace("MSP-Podcast", corpus)
    loop = loop.replace("table1/", f"{folder}/table1/").replace("cache/", f"{folder}/cache/")
    shell = "python() { printf '%s\\n' \"$*\"; }\n" + loop
    lines = subprocess.check_output(["bash", "-c", shell], text=True).splitlines()
    for line in lines:
        script, *words = line.split()
        assert script == "train.py"
        tiny = f"--model {encoder} --epochs 1 --batch-size 8 --workers 1 --device cpu"
        train.main([*words, *tiny.split()])
    return lines


def test_loop(corpus, encoder, tmp_path, capsys):
    """The loop makes 15 rows of as many runs as seeds; run again, it changes nothing; stats.py
    makes Table I of it."""
    import stats

    lines = run_loop(tmp_path, corpus, encoder)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    capsys.readouterr()
    assert run_loop(tmp_path, corpus, encoder) == lines and len(lines) == 30
    assert capsys.readouterr().out.count("is finished") == 30
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    stats.main([f"{tmp_path}/table1", "--format", "csv"])
    rows = capsys.readouterr().out.split("\n\n")[0].splitlines()[1:]
    assert len(rows) == 15


def test_interrupted_loop(tmp_path):
    """Ctrl-C, which the shell and a run both get, ends the whole loop, though train.py catches it
    and leaves with a status. So does this stand-in for Python."""
    fake = tmp_path / "python"
    fake.write_text("#!/bin/sh\necho begun\ntrap 'exit 130' INT\nkill -INT 0\n")
    fake.chmod(0o700)
    env = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    found = subprocess.run(
        ["bash", "-c", LOOP],
        env=env,
        start_new_session=True,
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.stdout == "begun\n"


@pytest.mark.parametrize("line", LINES)
def test_command_lines(line, monkeypatch):
    """Each line has only options that its script knows, in combinations that it takes."""
    line = re.sub(r"\$[A-Za-z]+", "1", line.replace("$precision", "fp16").replace("$A", "--data x"))
    script, *words = shlex.split(line[re.search(r"\S*\.py", line).start() :])
    module = __import__(Path(script).stem)
    if hasattr(module, "parse_args"):
        assert "--demo" in words or module.parse_args(words)
    elif Path(script).stem != "bench":
        parser, parse = module.argparse.ArgumentParser, module.argparse.ArgumentParser.parse_args
        monkeypatch.setattr(parser, "parse_args", lambda *a: (parse(*a), 1 / 0))
        with pytest.raises(ZeroDivisionError):  # understood, and stopped there
            module.main(words)


def test_bench(tmp_path, monkeypatch):
    """bench.py still fits what it measures: each kind of figure comes out, of a tiny encoder."""
    import bench

    tiny = {"num_hidden_layers": 3, "hidden_size": 48, "intermediate_size": 48}
    monkeypatch.setattr(bench, "BATCH", 4)
    monkeypatch.setattr(bench, "BASE", bench.BASE | tiny | {"conv_dim": (16,) * 7})
    monkeypatch.setattr(train.models, "choose_device", lambda _: "cpu")
    for row in ("full chunked recomputed fp32", "cached 3 fp32"):
        line = bench.run_row(row, 2, None)
        assert line["s/step"] > 0 and 0 < line["useful"] <= line["of rate"]
    found, loop = bench.measure_data(tmp_path / "data", cuda=False, quick=True)
    # A frame is 48 numbers of two bytes. The rest is what a shard says of itself.
    assert 96 < found["bytes/frame"] < 100 and loop["s/step"] > 0
    bench.prepare_scale(tmp_path / "scale", 25)
    for step in ("check", "fill", "entries", "start", "epoch"):
        assert bench.run_step(step, tmp_path / "scale")["s"] > 0
