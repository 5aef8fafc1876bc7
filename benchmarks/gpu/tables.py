"""The README's tables from benchmarks/results/DEVICE.json; what no file has is "not measured"."""

from collections.abc import Callable, Iterator
from typing import Any

from benchmarks.gpu.measure import NO_TIME, SIZES
from benchmarks.gpu.peers import PEERS

NOT_MEASURED = "not measured"
FAILED = "failed"
Tree = dict[str, Any]
Cell = Callable[[Tree, Tree], str | None]  # (a peer's entry, its head's) -> text


def _time(entry: Tree, head: Tree) -> str | None:
    if "seconds" not in entry:
        return None
    return f"{1000 * entry['seconds']:.1f} ({entry['ratio_to_floor']:.2f})"


def _memory(entry: Tree, head: Tree) -> str | None:
    return None if entry.get("peak_extra_bytes") is None else f"{entry['peak_extra_bytes'] / 2**30:.2f}"


def _errors(entry: Tree, head: Tree) -> str | None:
    if "reason" in entry or "errors" not in entry:
        return None
    errors = entry["errors"]
    return " / ".join("–" if name not in errors else f"{errors[name]:.1e}" for name in ("pir", "dhidden", "dlm_head"))


def _sizes(tree: Tree | None) -> list[Tree]:
    if tree and tree["sizes"]:
        return tree["sizes"]
    return [{"n": n, "d": d, "v": v, "heads": {}} for n, d, v in SIZES]


def _name(size: Tree) -> str:
    return f"{size['n']} × {size['d']} × {size['v']}"


def _text(cell: Cell, size: Tree, head: str, peer: str) -> str:
    measured = size["heads"].get(head, {"peers": {}})
    entry = measured["peers"].get(peer)
    if entry is None or entry.get("reason") == NO_TIME:
        return NOT_MEASURED
    return cell(entry, measured) or (FAILED if "reason" in entry else NOT_MEASURED)


def by_peer(tree: Tree | None, title: str, head: str, cell: Cell) -> Iterator[str]:
    """One row a peer, one column a size."""
    sizes = _sizes(tree)
    yield f"| {title} | {' | '.join(map(_name, sizes))} |"
    yield "| --- |" + " --- |" * len(sizes)
    for name, peer in PEERS.items():
        cells = [_text(cell, size, head, name) for size in sizes]
        if tree is None or any(text != FAILED for text in cells):
            yield f"| {peer.title} | {' | '.join(cells)} |"


def ceilings(tree: Tree | None) -> Iterator[str]:
    """What the machine can do, and the forward of token_logprobs beside the products alone."""
    yield "| N × D × V | matmul, TFLOP/s | copy, TB/s | floor, ms, trainable / frozen | token_logprobs ÷ cuBLAS |"
    yield "| --- | --- | --- | --- | --- |"
    for size in _sizes(tree):
        heads = size["heads"]
        floors = [heads.get(name, {}).get("floor") for name in ("trainable", "frozen")]
        head = heads.get("trainable") or heads.get("frozen") or {}
        logprobs = size.get("logprobs", {})
        cells = [
            f"{head['matmul_flops'] / 1e12:.0f}" if head.get("matmul_flops") else NOT_MEASURED,
            f"{head['bandwidth'] / 1e12:.2f}" if head.get("bandwidth") else NOT_MEASURED,
            " / ".join("–" if floor is None else f"{1000 * floor:.1f}" for floor in floors)
            if any(floors)
            else NOT_MEASURED,
            f"{logprobs['seconds'] / logprobs['matmul_seconds']:.2f}" if "seconds" in logprobs else NOT_MEASURED,
        ]
        yield f"| {_name(size)} | {' | '.join(cells)} |"


def chunks(tree: Tree | None) -> Iterator[str]:
    """Our time by the size of a chunk."""
    yield "| N × D × V | ms by tokens a chunk (logits); the shipped one is bold |\n| --- | --- |"
    for size in _sizes(tree):
        cells = []
        for entry in size.get("chunk_sweep", []):
            text = FAILED if "reason" in entry else f"{1000 * entry['seconds']:.1f}"
            text = f"{entry['rows']} ({entry['logits_bytes'] / 2**30:g} GiB): {text}"
            cells.append(f"**{text}**" if entry["shipped"] else text)
        yield f"| {_name(size)} | {', '.join(cells) or NOT_MEASURED} |"


def reasons(tree: Tree | None) -> Iterator[str]:
    """Why cells are empty: each peer's reasons once, with the sizes and heads they hold for."""
    found: dict[tuple[str, str], list[str]] = {}
    for size in (tree or {"sizes": []})["sizes"]:
        for head, steps in size["heads"].items():
            for peer, entry in steps["peers"].items():
                if entry.get("reason", NO_TIME) != NO_TIME:
                    found.setdefault((peer, entry["reason"]), []).append(f"N = {size['n']}, {head}")
        for reason in size.get("failed", []):
            found.setdefault(("run", reason), []).append(f"N = {size['n']}")
    for (peer, reason), places in found.items():
        title = PEERS[peer].title if peer in PEERS else peer
        yield f"- {title}: {reason} ({'; '.join(places)})"


def heading(tree: Tree | None) -> str:
    if tree is None or not tree["machine"]:
        return "GPU: not measured."
    machine = tree["machine"]
    packages = ", ".join(f"{name} {version}" for name, version in machine["packages"].items() if version)
    return (
        f"{machine['device']}, driver {machine['driver']}, {packages}, commit {machine['commit']}, {machine['date']}."
    )


def report(tree: Tree | None) -> str:
    """Everything, as Markdown."""
    tables = (
        by_peer(tree, "trainable head, ms (÷ floor)", "trainable", _time),
        by_peer(tree, "frozen head, ms (÷ floor)", "frozen", _time),
        by_peer(tree, "peak extra memory, GiB, trainable", "trainable", _memory),
        by_peer(tree, "peak extra memory, GiB, frozen", "frozen", _memory),
        by_peer(tree, "error: largest of PIR / of dhidden / of dlm_head", "trainable", _errors),
        ceilings(tree),
        chunks(tree),
        reasons(tree),
    )
    return "\n\n".join([heading(tree), *("\n".join(table) for table in tables)]).rstrip()
