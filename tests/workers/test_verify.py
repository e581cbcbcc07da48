"""`glmq verify` on a checkpoint that carries code: it passes on a sound one and finds each planted difference."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.checkpoint_code import add_code
from tests.lora_adapter import write_adapter
from workers import verify
from workers.models.loader import load_model
from workers.models.lora import linear_shapes, read_adapter

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # transformers 4.30.2 is older than what it imports
    pytest.mark.skipif(
        importlib.util.find_spec("transformers") is None, reason="the extra `reference` is not installed"
    ),
]
LITTLE = ("--max-new-tokens", "4")
TOKENIZATION, MODELING = "tokenization_chatglm.py", "modeling_chatglm.py"


@pytest.fixture
def verdicts(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., set[str]]:
    """Verifies a checkpoint in this process. Gives what differs."""
    monkeypatch.setenv("COLUMNS", "300")

    def run(folder: Path, *options: str) -> set[str]:
        code = verify.main(
            [str(folder), "--trust-remote-code", "--device", "cpu", "--threads", "1", *LITTLE, *options]
        )
        output = capsys.readouterr().out
        rows = [line.split("│")[1:-1] for line in output.splitlines() if line.startswith("│")]
        assert len(rows) == 7 + ("--adapter" in options), output
        different = {what.strip() for what, _, _, verdict in rows if verdict.strip() == "DIFFERENT"}
        assert code == int(bool(different))
        return different

    return run


def plant(path: Path, pattern: str, replacement: str) -> None:
    text, count = re.subn(pattern, replacement, path.read_text())
    assert count == 1, f"{pattern} is {count} times in {path.name}"
    path.write_text(text)


def test_a_sound_checkpoint_is_equal_in_everything(
    checkpoint_with_code: Path, verdicts: Callable[..., set[str]]
) -> None:
    assert verdicts(checkpoint_with_code) == set()


@pytest.mark.parametrize("name", ["chatglm-6b-tiny", "chatglm2-6b-tiny"])
def test_the_originals_data_and_our_code_for_both_generations_are_equal(
    golden_root: Path, copy_of: Callable[[Path], Path], verdicts: Callable[..., set[str]], name: str
) -> None:
    folder = copy_of(golden_root / name)
    add_code(folder)
    assert verdicts(folder) == set()


def test_an_adapter_is_compared_and_one_that_differs_is_found(
    checkpoint_with_code: Path,
    verdicts: Callable[..., set[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shapes = linear_shapes(load_model(checkpoint_with_code))
    adapter = write_adapter(tmp_path / "doctor", shapes, targets=("query_key_value", "dense_4h_to_h"))
    assert verdicts(checkpoint_with_code, "--adapter", str(adapter)) == set()
    other = read_adapter(write_adapter(tmp_path / "other", shapes, seed=1), shapes)
    monkeypatch.setattr("workers.reference.comparison.read_adapter", lambda *_: other)
    assert verdicts(checkpoint_with_code, "--adapter", str(adapter)) == {"logits with doctor"}


@pytest.mark.parametrize(
    "name", ["transformer.layers.1.mlp.dense_h_to_4h.weight", "transformer.final_layernorm.bias"]
)
def test_one_weight_that_differs_is_found(
    checkpoint_with_code: Path,
    copy_of: Callable[[Path], Path],
    verdicts: Callable[..., set[str]],
    name: str,
) -> None:
    folder = copy_of(checkpoint_with_code)
    state = load_file(folder / "model.safetensors")
    state[name].view(-1)[7] += 0.5
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    assert "logits" in verdicts(folder, "--reference", str(checkpoint_with_code))


@pytest.mark.parametrize(
    ("file", "pattern", "replacement", "what"),
    [
        (TOKENIZATION, r'replace\("\\n", "<n>"\)', r'replace("\\n", " ")', "tokenizer: text to ids"),
        (TOKENIZATION, r'\.replace\("<\|tab\|>", "\\t"\)', "", "tokenizer: ids to text"),
        (MODELING, r"\[Round \{i\}\]", "[Round {i + 1}]", "prompt"),
        (MODELING, r'"2023年"', '"2024年"', "clean-up of an answer"),
        (MODELING, r"BLOCK_DEPTH = 28", "BLOCK_DEPTH = 27", "logits"),
        (MODELING, r"HIDDEN_SCORE = -10000.0", "HIDDEN_SCORE = 0.0", "logits"),
    ],
)
def test_code_that_differs_is_found(  # noqa: PLR0917
    checkpoint_with_code: Path,
    copy_of: Callable[[Path], Path],
    verdicts: Callable[..., set[str]],
    file: str,
    pattern: str,
    replacement: str,
    what: str,
) -> None:
    folder = copy_of(checkpoint_with_code)
    plant(folder / file, pattern, replacement)
    assert what in verdicts(folder)


def test_the_command_runs_nothing_until_the_code_is_called_trusted(
    checkpoint_with_code: Path, copy_of: Callable[[Path], Path], tmp_path: Path
) -> None:
    folder = copy_of(checkpoint_with_code)
    trace = tmp_path / "it-ran"
    for path in folder.glob("*.py"):
        path.write_text(f"open({str(trace)!r}, 'w')\n" + path.read_text())
    command = [str(Path(sys.executable).with_name("glmq")), "verify", str(folder)]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert answer.returncode == 2
    assert "--trust-remote-code" in answer.stderr
    assert not trace.exists()


def test_a_checkpoint_without_code_is_one_line_of_error(
    tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert verify.main([str(tiny_checkpoint), "--trust-remote-code", "--device", "cpu"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("glmq verify: ")
    assert "auto_map" in line
