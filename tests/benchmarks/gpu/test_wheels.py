"""The parts that travel to a GPU machine: split, described, checked, joined and installed. No network."""

import json
import re
import zipfile
from pathlib import Path

import pytest

from benchmarks.gpu import peers, wheels


def tiny_wheel(directory: Path, name: str, tag: str = "py3-none-any") -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    path, info = directory / f"{name}-1.0-{tag}.whl", f"{name}-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{name}.py", f"NAME = {name!r}\n" + "#" * 3000)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", f"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: {tag}\n")
        archive.writestr(f"{info}/RECORD", "")
    return path


@pytest.fixture
def parts(tmp_path: Path) -> list[Path]:
    """c1 and c2: a wheel in two pieces, and a small one."""
    large = tiny_wheel(tmp_path / "downloads", "large")
    small = tiny_wheel(tmp_path / "downloads", "small")
    with zipfile.ZipFile(large, "a") as archive:
        archive.writestr("large_data.bin", bytes(6000))
    return wheels.fill(tmp_path / "wheels", "c", [small, large], limit=large.stat().st_size - 100)


def test_wheels_within_the_limit_are_one_part(tmp_path):
    found = [tiny_wheel(tmp_path / "downloads", name) for name in ("one", "two")]
    (part,) = wheels.fill(tmp_path / "wheels", "b", found)
    assert part.name == "b"
    assert sorted(path.name for path in part.glob("*.whl")) == [path.name for path in found]


def test_a_large_wheel_is_split_over_parts_and_described(tmp_path, parts):
    large = tmp_path / "downloads/large-1.0-py3-none-any.whl"
    assert [part.name for part in parts] == ["c1", "c2"]
    pieces = [path for part in parts for path in sorted(part.glob("large*"))]
    assert [path.suffix for path in pieces] == [".000", ".001"]
    assert b"".join(path.read_bytes() for path in pieces) == large.read_bytes()
    for part in parts:
        files = json.loads((part / wheels.MANIFEST).read_text())["files"]
        assert set(files) == {path.name for path in part.iterdir()} - {wheels.MANIFEST}
        for name, entry in files.items():
            assert entry["size"] == (part / name).stat().st_size
            assert entry["sha256"] == wheels.sha256(part / name)
            assert entry.get("pieces") == (2 if name.startswith("large") else None)


def test_parts_are_installed_without_a_network(tmp_path, parts):
    site = tmp_path / "site-packages"
    assert wheels.main(["--unpack", str(site), *map(str, parts)]) == 0
    assert (site / "small.py").is_file()
    assert (site / "large_data.bin").stat().st_size == 6000


def test_damaged_and_missing_files_are_named_and_the_others_installed(tmp_path, parts, capsys):
    site, more = tmp_path / "site-packages", wheels.fill(tmp_path / "wheels", "b", [tiny_wheel(tmp_path, "other")])
    (piece,) = parts[0].glob("large*")
    piece.write_bytes(piece.read_bytes()[:-1] + b"?")
    (more[0] / "gone.whl").write_bytes(b"1")
    wheels.write_manifest(more[0])
    (more[0] / "gone.whl").unlink()
    assert wheels.main(["--unpack", str(site), *map(str, [*parts, *more, tmp_path / "absent"])]) == 1
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 4
    assert f"{piece}: damaged" in said[0]
    assert f"{more[0] / 'gone.whl'}: missing" in said[1]
    assert f"{tmp_path / 'absent'}: no readable MANIFEST.json" in said[2]
    assert "large-1.0-py3-none-any.whl: piece 000 is missing" in said[3]
    assert (site / "small.py").is_file() and (site / "other.py").is_file()
    assert not (site / "large.py").exists()


@pytest.mark.slow
def test_a_wheel_for_another_python_is_left_out(tmp_path):
    found = [tiny_wheel(tmp_path, "good"), tiny_wheel(tmp_path, "bad", "cp27-cp27m-win32")]
    (problem,) = wheels.unpack(tmp_path / "site-packages", wheels.fill(tmp_path / "wheels", "b", found))
    assert problem.startswith("bad-1.0-cp27-cp27m-win32.whl: ERROR")
    assert (tmp_path / "site-packages/good.py").is_file()


def test_a_site_of_another_name_is_refused(tmp_path, parts):
    (problem,) = wheels.unpack(tmp_path / "site", parts)
    assert "expected a directory called site-packages" in problem


def test_the_first_command_carries_what_is_too_much_for_the_second(tmp_path, parts, monkeypatch):
    monkeypatch.setattr(wheels, "PART_LIMIT", wheels.size(parts[1]) + 10_000)
    other = {letter: wheels.fill(tmp_path / "wheels", letter, [tiny_wheel(tmp_path, letter)]) for letter in "abd"}
    text = "\n".join(wheels.advice({**other, "c": parts}))
    first, second = re.findall(r"carries (.*):", text)
    assert [path.rpartition("/")[2] for path in first.split(", ")] == ["a", "c1"]
    assert [path.rpartition("/")[2] for path in second.split(", ")] == ["b", "c2", "d"]
    assert re.search(r'make gpu-b WHEELS="\S*b \S*c1 \S*c2 \S*d"', text)


def test_the_pins_are_the_versions_that_the_peers_are_written_for():
    stated = dict(re.findall(r"([a-z-]+) (\d[\d.]*\d)", (peers.__doc__ or "").rpartition("signatures are those")[2]))
    assert stated.keys() == {"liger-kernel", "cut-cross-entropy", "quack-kernels", "trl"}
    assert {name: wheels.PINS[name][0] for name in stated} == stated


def test_the_tiny_model_can_be_trained(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    wheels.save_model(tmp_path)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert model.dtype.is_floating_point and model.dtype.itemsize == 2
    assert len(tokenizer) <= model.config.vocab_size and tokenizer.chat_template
    assert all(size % 64 == 0 for parameter in model.parameters() for size in parameter.shape)
