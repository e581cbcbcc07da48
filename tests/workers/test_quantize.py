"""`glmq quantize` as a person uses it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from workers import quantize
from workers.models.config import ModelConfig


def test_the_command_writes_a_checkpoint_and_says_what_it_costs(tiny_checkpoint, tmp_path):
    command = [str(Path(sys.executable).with_name("glmq")), "quantize", str(tiny_checkpoint), "small"]
    arguments = ["--bits", "4", "--head", "int8", "--threads", "1"]
    done = subprocess.run(
        command + arguments, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=100
    )
    assert done.returncode == 0, done.stderr
    assert ModelConfig.from_folder(tmp_path / "small").quantization_bit == 4
    for text in ("query_key_value", "word_embeddings", "int4", "int8", "glmq worker --checkpoint small"):
        assert text in done.stdout
    assert "quantizing to int4" in done.stderr


def test_what_goes_wrong_is_one_line(tiny_checkpoint, tmp_path, capsys):
    assert quantize.main([str(tmp_path / "missing"), str(tmp_path / "small"), "--bits", "8"]) == 1
    assert quantize.main([str(tiny_checkpoint), str(tmp_path), "--bits", "8"]) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("glmq quantize: ")]
    assert len(lines) == 2
    assert "config.json: the file does not exist" in lines[0]
    assert "it exists already. Give a folder that does not exist" in lines[1]


def test_an_adapter_that_does_not_fit_is_an_error_that_names_it(tiny_checkpoint, tmp_path, capsys):
    arguments = [str(tiny_checkpoint), str(tmp_path / "small"), "--bits", "8", "--adapter", str(tmp_path)]
    assert quantize.main(arguments) == 1
    assert "adapter_config.json" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", [["--bits", "5"], [], ["--bits", "4", "--head", "int4"]])
def test_options_that_are_wrong_are_refused_before_anything_is_read(tmp_path, arguments, capsys):
    with pytest.raises(SystemExit) as raised:
        quantize.main([str(tmp_path), str(tmp_path / "small"), *arguments])
    assert raised.value.code == 2
    assert "--bits" in capsys.readouterr().err


def test_torch_is_not_imported_for_the_options():
    code = "import sys, workers.quantize; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
