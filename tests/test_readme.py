"""What README.md shows is so: its Python runs, and its command lines are understood."""

import inspect
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import train

README = Path(train.__file__).with_name("README.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"^# with (.*)\n((?s:.*?))(?=^# with |^```)", README, re.MULTILINE)
LINES = re.findall(r"(?:^|(?<=`))(?:python|torchrun) .*?\.py[^`|#\n]*", README, re.MULTILINE)
LINES += [f"train.py --data x --out x {row}" for row in re.findall(r"\| `(--.* .*)` \|", README)]


@pytest.mark.parametrize("files, code", SNIPPETS)
def test_python(files, code, tmp_path):
    """Each snippet runs in a folder with only the files that it names, or after train.predict."""
    above = inspect.getsource(train.predict) if "train.predict" in files else ""
    for file in re.findall(r"\w+\.py", files):
        (tmp_path / file).write_text(Path(train.__file__).with_name(file).read_text())
    subprocess.run([sys.executable, "-c", above + code], cwd=tmp_path, check=True)


@pytest.mark.parametrize("line", LINES)
def test_command_lines(line, monkeypatch):
    """Each line has only options that its script knows, in combinations that it takes."""
    script, *words = shlex.split(line[re.search(r"\S*\.py", line).start() :])
    module = __import__(Path(script).stem)
    if hasattr(module, "parse_args"):
        assert module.parse_args(words)
    else:
        parser, parse = module.argparse.ArgumentParser, module.argparse.ArgumentParser.parse_args
        monkeypatch.setattr(parser, "parse_args", lambda *a: (parse(*a), 1 / 0))
        with pytest.raises(ZeroDivisionError):  # understood, and stopped there
            module.main(words)
