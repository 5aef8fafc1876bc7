"""python -m perce.preview, the command."""

import subprocess
import sys

import pytest
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from perce.preview import main
from tests.helpers.tiny import save_tiny_model, tiny_tokenizer


def test_the_built_in_examples(tmp_path, capsys):
    model = save_tiny_model(tmp_path / "model")
    assert main(["--model", str(model), "--rows", "1"]) == 0
    printed = capsys.readouterr().out
    assert "without the persona" in printed and printed.count("⟦persona: ") == 1


@pytest.mark.parametrize("files", ["adapter and tokenizer", "adapter"])
def test_an_adapter_is_previewed_with_the_tokenizer_that_is_asked_later(tmp_path, capsys, files):
    model = save_tiny_model(tmp_path / "model")
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(model), LoraConfig(task_type="CAUSAL_LM"))
    adapted.save_pretrained(tmp_path / "adapter")
    template = "{% for m in messages %}{{ m.role }}> {{ m.content }}<|im_end|>{% endfor %}"
    if "tokenizer" in files:
        tiny_tokenizer(template).save_pretrained(tmp_path / "adapter")
    assert main(["--model", str(tmp_path / "adapter"), "--rows", "1"]) == 0
    assert ("user> " in capsys.readouterr().out) == ("tokenizer" in files)


def test_mistakes_are_told_in_a_line(tmp_path, capsys):
    assert main(["--data", str(tmp_path / "none.jsonl")]) == 2
    assert "error: No such file or directory" in capsys.readouterr().err
    assert main(["--rows", "-1"]) == 2
    assert "rows: expected >= 0, got -1" in capsys.readouterr().err


def test_as_a_module():
    done = subprocess.run([sys.executable, "-m", "perce.preview", "--help"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "--sample" in done.stdout and "--persona_markers" in done.stdout
