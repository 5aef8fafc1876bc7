"""Collects packages for a GPU machine without a network, in parts of limited size: `python -m benchmarks.gpu.wheels`.

    a     what perce.train imports besides torch and transformers, and a tiny random model in a/model
    b     the peers that Triton compiles: Liger, cut-cross-entropy, TRL's head
    c     CuTe DSL for CUDA 13 and quack; with b, also Liger's CuTe kernels. Too large for one part: c1 and c2
    d     flash-attn-4, which needs c: --attn_implementation flash_attention_4

The machine must have Linux on x86-64, Python 3.12, torch 2.11 for CUDA 13, triton, transformers, accelerate, peft,
numpy, pandas, pyarrow 24, requests and xxhash. A part is a directory of wheels with MANIFEST.json: the size and SHA-256
of every file. A wheel that is too large for a part is divided into pieces NAME.whl.000, NAME.whl.001.

    python -m benchmarks.gpu.wheels --unpack build/site-packages build/wheels/b build/wheels/c1 build/wheels/c2

checks the files, joins the pieces and installs the wheels without their dependencies. Missing and damaged files are
named and left out; the others are installed.
"""

import argparse
import hashlib
import json
import math
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
MIB = 2**20
PART_LIMIT = 60 * MIB
MANIFEST = "MANIFEST.json"
PINS = {  # name: version, parts
    "datasets": ("5.2.0", "ab"),
    "dill": ("0.4.1", "ab"),
    "multiprocess": ("0.70.19", "ab"),
    "bm25s": ("0.3.16", "a"),
    "gguf": ("0.19.0", "a"),
    "liger-kernel": ("0.8.5", "b"),
    "cut-cross-entropy": ("25.1.1", "b"),
    "trl": ("1.16.0", "b"),
    "quack-kernels": ("0.6.5", "c"),
    "nvidia-cutlass-dsl": ("4.7.1", "c"),  # the newest when quack 0.6.5 was released, which requires 4.7 or later
    "nvidia-cutlass-dsl-libs-base": ("4.7.1", "c"),
    "nvidia-cutlass-dsl-libs-core": ("4.7.1", "c"),
    "nvidia-cutlass-dsl-libs-cu13": ("4.7.1", "c"),
    "apache-tvm-ffi": ("0.1.15.post2", "c"),
    "torch-c-dlpack-ext": ("0.1.5", "c"),
    "einops": ("0.8.2", "c"),
    "flash-attn-4": ("4.0.0b36", "d"),
}
COMMANDS = {"a": ("a",), "b": ("b", "c", "d")}  # make gpu-a, make gpu-b
# pip accepts only wheels for platforms that are named.
PLATFORMS = ("manylinux_2_28", "manylinux_2_27", "manylinux_2_24", "manylinux_2_17", "manylinux2014")
MODEL = {  # sizes are multiples of 64, which suit bf16 kernels on a GPU
    "vocab_size": 4096, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.02,
}  # fmt: skip


def collect(directory: Path, downloads: Path) -> dict[str, list[Path]]:
    """Downloads the wheels, makes the model and fills `directory` with parts. Returns the parts of each letter."""
    found = {}
    for letter in sorted({letter for _, letters in PINS.values() for letter in letters}):
        pins = {name: version for name, (version, letters) in PINS.items() if letter in letters}
        found[letter] = download(pins, downloads)
    shutil.rmtree(directory, ignore_errors=True)
    save_model(directory / "a/model")
    return {letter: fill(directory, letter, wheels) for letter, wheels in found.items()}


def download(pins: dict[str, str], downloads: Path) -> list[Path]:
    wanted = [f"{name}=={version}" for name, version in pins.items()]
    target = [f"--platform={platform}_x86_64" for platform in PLATFORMS]
    target += ["--python-version=3.12", "--implementation=cp", "--only-binary=:all:", "--no-deps"]
    subprocess.run(
        [sys.executable, "-m", "pip", "download", "-qq", *target, f"--dest={downloads}", *wanted], check=True
    )
    return [wheel_of(name, version, downloads) for name, version in pins.items()]


def wheel_of(name: str, version: str, directory: Path) -> Path:
    prefix = f"{re.sub('[-_.]+', '_', name)}-{version}-"
    (wheel,) = [path for path in directory.glob("*.whl") if path.name.startswith(prefix)]
    return wheel


def save_model(directory: Path) -> Path:
    from tests.helpers import tiny

    tiny.tiny_model("llama", **MODEL).bfloat16().save_pretrained(directory)
    tiny.tiny_tokenizer().save_pretrained(directory)
    return directory


def fill(directory: Path, letter: str, wheels: Sequence[Path], limit: int = PART_LIMIT) -> list[Path]:
    """Part `letter`, or parts letter1, letter2, … of about the same size if one part would exceed the limit."""
    count = math.ceil(sum(wheel.stat().st_size for wheel in wheels) / limit)
    share = math.ceil(sum(wheel.stat().st_size for wheel in wheels) / count)
    parts: list[dict[str, bytes]] = [{}]
    pieces: dict[str, int] = {}
    for wheel in sorted(wheels, key=lambda path: path.stat().st_size, reverse=True):
        content = wheel.read_bytes()
        if len(content) > share:
            for number, start in enumerate(range(0, len(content), share)):
                if parts[-1]:
                    parts.append({})
                parts[-1][f"{wheel.name}.{number:03}"] = content[start : start + share]
                pieces[wheel.name] = number + 1
        else:
            if sum(map(len, parts[-1].values())) + len(content) > limit:
                parts.append({})
            parts[-1][wheel.name] = content
    names = [letter] if len(parts) == 1 else [f"{letter}{number}" for number in range(1, len(parts) + 1)]
    for name, files in zip(names, parts, strict=True):
        (directory / name).mkdir(parents=True, exist_ok=True)
        for file, content in files.items():
            (directory / name / file).write_bytes(content)
        write_manifest(directory / name, pieces)
    return [directory / name for name in names]


def write_manifest(part: Path, pieces: dict[str, int] | None = None) -> None:
    files: dict[str, Any] = {}
    for path in sorted(part.rglob("*")):
        if path.is_file() and path.name != MANIFEST:
            name = path.relative_to(part).as_posix()
            files[name] = {"size": path.stat().st_size, "sha256": sha256(path)}
            if (whole := name.rpartition(".")[0]) in (pieces or {}):
                files[name] |= {"piece_of": whole, "pieces": (pieces or {})[whole]}
    (part / MANIFEST).write_text(json.dumps({"files": files}, indent=1) + "\n", encoding="utf-8")


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def size(part: Path) -> int:
    return sum(path.stat().st_size for path in part.rglob("*") if path.is_file())


def advice(parts: dict[str, list[Path]]) -> Iterator[str]:
    """The parts' sizes, and which command carries and which unpacks each part."""
    yield f"{'part':20}{'MiB':>6}"
    for part in (part for letter in parts.values() for part in letter):
        yield f"{relative(part):20}{size(part) / MIB:6.1f}"
    ahead: list[Path] = []  # what the first command carries for the second
    needed = [part for letter in COMMANDS["b"] for part in parts[letter]]
    while sum(map(size, set(needed) - set(ahead))) > PART_LIMIT:
        ahead.append(next(part for part in needed if part not in ahead and part not in parts["b"]))
    for command, own in (("a", parts["a"] + ahead), ("b", [part for part in needed if part not in ahead])):
        unpacked = parts["a"] if command == "a" else needed
        yield ""
        yield f'make gpu-{command} WHEELS="{" ".join(map(relative, unpacked))}"'
        yield f"    carries {', '.join(map(relative, own))}: {sum(map(size, own)) / MIB:.1f} MiB"
    if ahead:
        yield ""
        yield f"The second command's parts have more than {PART_LIMIT // MIB} MiB together, so the first command also"
        yield f"carries {', '.join(map(relative, ahead))}, without unpacking. If the second command runs on another"
        yield "machine, bring these parts there with another command first."


def relative(part: Path) -> str:
    return part.relative_to(ROOT).as_posix() if part.is_relative_to(ROOT) else str(part)


def unpack(site: Path, parts: Iterable[Path]) -> list[str]:
    """Installs the parts' wheels into `site`. Returns problems, one line per file."""
    if site.name != "site-packages":  # quack treats functions outside site-packages as the user's own
        return [f"{site}: expected a directory called site-packages. quack cannot be imported from any other."]
    wheels, pieces, problems = read_parts(parts)
    with tempfile.TemporaryDirectory() as work:
        for name, found in pieces.items():
            if missing := [number for number, path in enumerate(found) if path is None]:
                problems.append(f"{name}: piece {', '.join(f'{number:03}' for number in missing)} is missing")
            else:
                wheels[name] = join(Path(work) / name, [path for path in found if path])
        problems += install(site, list(wheels.values()))
    return problems


def read_parts(parts: Iterable[Path]) -> tuple[dict[str, Path], dict[str, list[Path | None]], list[str]]:
    """Undamaged wheels and pieces by name, and a list of problems."""
    wheels: dict[str, Path] = {}
    pieces: dict[str, list[Path | None]] = {}
    problems = []
    for part in parts:
        try:
            files = json.loads((part / MANIFEST).read_text(encoding="utf-8"))["files"]
        except (OSError, ValueError, KeyError) as error:
            problems.append(f"{part}: no readable {MANIFEST}: {error}")
            continue
        for name, entry in files.items():
            path = part / name
            if whole := entry.get("piece_of"):
                pieces.setdefault(whole, [None] * entry["pieces"])
            if complaint := damage(path, entry):
                problems.append(f"{path}: {complaint}")
            elif whole:
                pieces[whole][int(path.suffix[1:])] = path
            elif path.suffix == ".whl":
                wheels[name] = path
    return wheels, pieces, problems


def damage(path: Path, entry: dict[str, Any]) -> str | None:
    if not path.is_file():
        return "missing"
    if path.stat().st_size != entry["size"]:
        return f"damaged: expected {entry['size']:,} bytes, found {path.stat().st_size:,}"
    return None if sha256(path) == entry["sha256"] else "damaged: its SHA-256 differs"


def join(whole: Path, pieces: Iterable[Path]) -> Path:
    with whole.open("wb") as file:
        for piece in pieces:
            file.write(piece.read_bytes())
    return whole


def install(site: Path, wheels: list[Path]) -> list[str]:
    """Installs all wheels in one call, because in several calls packages that share a directory would replace each
    other. A wheel that pip refuses here, for example one for another Python, is left out."""
    options = ["--no-index", "--no-deps", "--disable-pip-version-check", "--no-cache-dir"]
    problems = []
    for attempt in ("all", "those that pip takes"):
        if not wheels:
            break
        pip = run_pip("install", *options, "--no-compile", "--upgrade", "--target", str(site), *map(str, wheels))
        if pip.returncode == 0:
            break
        if attempt != "all":
            problems.append(f"{site}: {last_line(pip.stderr)}")
            break
        refused = {}
        for wheel in wheels:
            alone = run_pip("install", *options, "--dry-run", "--ignore-installed", str(wheel))
            if alone.returncode:
                refused[wheel] = f"{wheel.name}: {last_line(alone.stderr)}"
        problems += refused.values()
        wheels = [wheel for wheel in wheels if wheel not in refused]
    return problems


def run_pip(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "pip", *arguments, "-q"], capture_output=True, text=True, check=False)


def last_line(text: str) -> str:
    return (text.strip().splitlines() or ["pip failed without a message"])[-1]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.wheels", description=(__doc__ or "").split(":")[0])
    parser.add_argument("--unpack", metavar="SITE", type=Path, help="install the parts' wheels into this directory")
    parser.add_argument("parts", nargs="*", type=Path, metavar="DIR", help="parts to unpack")
    options = parser.parse_args(argv)
    if bool(options.unpack) != bool(options.parts):
        parser.error("expected --unpack SITE DIR…, or nothing")
    if not options.unpack:
        print("\n".join(advice(collect(ROOT / "build/wheels", ROOT / "build/downloads"))))
        return 0
    problems = unpack(options.unpack, options.parts)
    for problem in problems:
        print(f"wheels: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
