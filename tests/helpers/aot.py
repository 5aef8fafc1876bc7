"""Compile every kernel at every tile of the table, without a GPU: `python -m tests.helpers.aot`.

Prints registers, spills and shared memory as the compiler reports them; takes [--json|--launchers] [--quick] [sm_90 …].
With --json it disassembles only what test_aot.py reads, because a disassembly takes half a second. Must run without
TRITON_INTERPRET, under which the kernels are plain Python: test_aot.py starts it in a process of its own.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from perce_kernels.gpu import combine, lse_gemm, row_halves, row_loss, scale, stored_rows, tiles
from perce_kernels.vocab_parallel import Shard

BIN = Path(triton.__file__).parent / "backends/nvidia/bin"
NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
USAGE = ("REG", "STACK", "LOCAL")
INSTRUCTION = r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ )?\s*([A-Z][A-Z0-9_.]*)([^;]*);"
SPIN = 10 * 16
"""A loop of at most this many bytes of machine code only waits."""
MACHINE = ("HGMMA", "UTCHMMA", "HMMA", "UTMALDG", "UTMASTG", "LDGSTS")
INSTRUCTIONS = ("wgmma.mma_async", "tcgen05.mma", "mma.sync", "cp.async.bulk.tensor", "cp.async.cg", "bar.sync",
                "ld.global.L1::evict_first")  # fmt: skip

ROW_LOSS = {  # per-row options; the dtype is that of dz
    "plain": {"dtypes": (torch.bfloat16, torch.float32)},
    "softcap, bias, ratio": {"dtypes": (torch.bfloat16, torch.float32), "cap": True, "bias": True, "ratio": True},
    "given weight, scaled": {"dtypes": (torch.float16,), "source": "token_weight", "scale": True},
    "statistics": {"dtypes": (torch.bfloat16,), "need_dz": False},
}
ROW_HALVES = {"plain": (torch.bfloat16,), "softcap, bias": (torch.float16, torch.float32)}  # dtypes of dz
LSE_GEMM: dict[str, dict[str, Any]] = {
    "plain": {},
    "softcap, bias, entropy": {"cap": True, "bias": True, "entropy": True},
}


REPEATED = {  # whose kernel is compiled with another dtype and these options, and with this dtype and other options
    "row_loss": ("fp32, plain", "bf16, softcap, bias, ratio"),
    "row_halves": ("gradient, fp32, softcap, bias",),
    "lse_gemm": ("bf16, TMA, plain", "fp16, TMA, softcap, bias, entropy",
                 "bf16, pointers, plain", "fp16, pointers, softcap, bias, entropy"),
}  # fmt: skip


def is_quick(arch: str, kernel: str, variant: str) -> bool:
    """Whether "auto" launches the kernel there, and the variant is none of those that repeat others."""
    launched = tiles.WAY[arch] == "stored" or kernel not in ("store_gemm", "stored_rows")
    return launched and variant not in REPEATED.get(kernel, ())


def is_disassembled(arch: str, kernel: str, variant: str) -> bool:
    """Whether test_aot.py reads the machine code: the loops over rows, and the GEMM's instructions on Hopper."""
    over_rows = kernel in ("row_loss", "row_halves", "stored_rows") and "plain" in variant
    products = kernel.endswith("_gemm") and not variant.startswith("fp32")
    return products if arch == "sm_90" and kernel.endswith("_gemm") else arch in ("sm_80", "sm_90") and over_rows


def row_loss_source(
    tile: tiles.Tile, dtype, *, source="logp_cf", cap=False, bias=False, ratio=False, scale=False, need_dz=True
):
    types = {
        "z_ptr": "*fp32", "target_ptr": "*i64", "given_ptr": "*fp32", "bias_ptr": f"*{NAMES[dtype]}" if bias else None,
        "dz_scale_ptr": "*fp32" if scale else None, "dz_ptr": f"*{NAMES[dtype]}" if need_dz else None,
        "logp_ptr": "*fp32", "logp_cf_ptr": "*fp32", "weight_ptr": "*fp32",
        "V": "i32", "ignore_index": "i32", "stride_z": "i32", "stride_dz": "i32",
        "clip_min": "fp32", "clip_max": "fp32", "softcap": "fp32", "logit_scale": "fp32",
    }  # fmt: skip
    constants = {
        "SOURCE": row_loss.SOURCES[source], "RATIO": ratio, "HAS_BIAS": bias, "HAS_SOFTCAP": cap,
        "HAS_DZ_SCALE": scale, "NEED_DZ": need_dz, "BLOCK_V": tile.block_n, "STAGES": tile.num_stages,
    }  # fmt: skip
    return source_of(row_loss.row_loss_kernel, types, constants, aligned=("stride_z", "stride_dz"))


def row_parts_source(tile: tiles.Tile, dtype, *, cap=False, bias=False):
    types = {
        "z_ptr": "*fp32", "target_ptr": "*i64", "bias_ptr": f"*{NAMES[dtype]}" if bias else None, "max_ptr": "*fp32",
        "sum_ptr": "*fp32", "z_target_ptr": "*fp32", "V": "i32", "start": "i32", "stride_z": "i32", "softcap": "fp32",
        "logit_scale": "fp32",
    }  # fmt: skip
    constants = {"HAS_BIAS": bias, "HAS_SOFTCAP": cap, "BLOCK_V": tile.block_n, "STAGES": tile.num_stages}
    return source_of(row_halves.row_parts_kernel, types, constants, aligned=("stride_z",))


def row_gradient_source(tile: tiles.Tile, dtype, *, cap=False, bias=False):
    scale = dtype == torch.float16
    types = dict.fromkeys(("z_ptr", "max_ptr", "sum_ptr", "logp_ptr", "weight_ptr"), "*fp32") | {
        "column_ptr": "*i64", "bias_ptr": f"*{NAMES[dtype]}" if bias else None,
        "dz_scale_ptr": "*fp32" if scale else None, "dz_ptr": f"*{NAMES[dtype]}", "V": "i32", "stride_z": "i32",
        "stride_dz": "i32", "softcap": "fp32", "logit_scale": "fp32",
    }  # fmt: skip
    constants = {"HAS_BIAS": bias, "HAS_SOFTCAP": cap, "HAS_DZ_SCALE": scale, "BLOCK_V": tile.block_n}
    return source_of(row_halves.row_gradient_kernel, types, constants, aligned=("stride_z", "stride_dz"))


def stored_gradient_source(tile: tiles.Tile, dtype, columns: int, *, cap=False):
    scale = dtype == torch.float16
    pointers = ("tile_max_ptr", "z_target_ptr", "max_ptr", "sum_ptr", "logp_ptr", "weight_ptr")
    types = dict.fromkeys(pointers, "*fp32") | {
        "stored_ptr": f"*{NAMES[dtype]}", "target_ptr": "*i64", "dz_scale_ptr": "*fp32" if scale else None,
        "V": "i32", "stride_stored": "i32", "stride_tile": "i32", "softcap": "fp32", "logit_scale": "fp32",
    }  # fmt: skip
    constants = {
        "HAS_SOFTCAP": cap, "HAS_DZ_SCALE": scale, "TILE": columns, "BLOCK_T": tile.block_n // columns,
        "STAGES": tile.num_stages,
    }  # fmt: skip
    return source_of(stored_rows.stored_gradient_kernel, types, constants, aligned=("stride_stored",))


def lse_gemm_source(tile: tiles.Tile, dtype, *, cap=False, bias=False, entropy=False, store=False):
    name, (m, n, k), tma = NAMES[dtype], tile[:3], tile.use_tma
    columns = tile.statistics_columns
    stored = f"tensordesc<{name}[{m}, {columns}]>" if tma else f"*{name}"
    types = {
        "h_src": f"tensordesc<{name}[{m}, {k}]>" if tma else f"*{name}",
        "w_src": f"tensordesc<{name}[{n}, {k}]>" if tma else f"*{name}",
        "target_ptr": "*i64", "bias_ptr": f"*{name}" if bias else None, "max_ptr": "*fp32", "sum_ptr": "*fp32",
        "moment_ptr": "*fp32" if entropy else None, "z_target_ptr": "*fp32",
        "stored": stored if store else None, "n": "i32", "V": "i32", "D": "i32",
        "stride_hn": "i32", "stride_wv": "i32", "stride_stored": "i32",
        "softcap": "fp32", "logit_scale": "fp32",
    }  # fmt: skip
    constants = {
        "HAS_BIAS": bias, "HAS_SOFTCAP": cap, "HAS_ENTROPY": entropy, "STORE": store, "USE_TMA": tma,
        "PERSISTENT": tile.persistent, "UPCAST": False, "GROUP_M": tile.group_m, "BLOCK_M": m, "BLOCK_N": n,
        "BLOCK_K": k, "COLUMNS": columns,
    }  # fmt: skip
    return source_of(
        lse_gemm.lse_gemm_kernel, types, constants, aligned=("D", "stride_hn", "stride_wv", "stride_stored")
    )


def combine_source(entropy: bool):
    needed = ("max_ptr", "sum_ptr", "z_target_ptr", "logp_ptr", "row_max_ptr", "total_ptr")
    pointers = dict.fromkeys(needed, "*fp32")
    optional = dict.fromkeys(("moment_ptr", "entropy_ptr", "row_moment_ptr"), "*fp32" if entropy else None)
    types = pointers | optional | {"target_ptr": "*i64", "n": "i32", "T": "i32", "ignore_index": "i32"}
    constants = {"HAS_ENTROPY": entropy, "BLOCK": combine.BLOCK, "BLOCK_T": combine.BLOCK_T, "STAGES": combine.STAGES}
    return source_of(combine.combine_kernel, types, constants, ())


def scale_source(dtype, size: str):
    types = {"x_ptr": "*fp32", "factor_ptr": "*fp32", "out_ptr": f"*{NAMES[dtype]}", "size": size}
    return source_of(scale.scale_kernel, types, {"BLOCK": scale.BLOCK}, ("size",))


def source_of(kernel, types: dict[str, str | None], constants: dict[str, Any], aligned: tuple[str, ...]) -> ASTSource:
    """What the launcher would compile: None is a constant, and pointers and pitches are multiples of 16."""
    absent = {name: None for name, kind in types.items() if kind is None}
    signature = {name: types.get(name) or "constexpr" for name in kernel.arg_names}
    multiples = [name for name, kind in types.items() if (kind or "").startswith("*") or name in aligned]
    attributes = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in multiples}
    return ASTSource(fn=kernel, signature=signature, constexprs=absent | constants, attrs=attributes)


def described(tile: tiles.Tile, dtype, options: str) -> str:
    return f"{NAMES[dtype]}, {'TMA' if tile.use_tma else 'pointers'}, {options}"


def jobs(arch: str) -> Iterator[tuple[str, tiles.Tile, str, ASTSource]]:
    """(kernel, tile, description, source) of everything that the table can ask for on this architecture."""
    for row in tiles.TABLE:
        if row.arch != arch:
            continue
        if row.kernel == "rows":
            for name, variant in ROW_LOSS.items():
                options = dict(variant)
                for dtype in options.pop("dtypes"):
                    yield "row_loss", row.tile, f"{NAMES[dtype]}, {name}", row_loss_source(row.tile, dtype, **options)
            for name, dtypes in ROW_HALVES.items():
                options = {"cap": name != "plain", "bias": name != "plain"}
                yield "row_halves", row.tile, f"parts, {name}", row_parts_source(row.tile, torch.bfloat16, **options)
                for dtype in dtypes:
                    source = row_gradient_source(row.tile, dtype, **options)
                    yield "row_halves", row.tile, f"gradient, {NAMES[dtype]}, {name}", source
            continue
        if row.kernel == "stored_rows":
            columns = tiles.find("store_gemm", arch, torch.bfloat16).statistics_columns
            for dtype, cap in ((torch.bfloat16, False), (torch.float16, True)):
                source = stored_gradient_source(row.tile, dtype, columns, cap=cap)
                yield "stored_rows", row.tile, f"{NAMES[dtype]}, {'softcap' if cap else 'plain'}", source
            continue
        if row.kernel == "store_gemm":  # lse_gemm with a store; bf16 and fp16 compile to the same code
            for dtype, name in ((torch.bfloat16, "softcap, bias"), (torch.float16, "plain")):
                for tile in dict.fromkeys((row.tile, lse_gemm.by_pointers(row.tile))):
                    options = {"cap": name != "plain", "bias": name != "plain", "store": True}
                    yield "store_gemm", tile, described(tile, dtype, name), lse_gemm_source(tile, dtype, **options)
            continue
        for dtype in row.dtypes:
            for name, options in LSE_GEMM.items():
                for tile in dict.fromkeys((row.tile, lse_gemm.by_pointers(row.tile))):
                    yield "lse_gemm", tile, described(tile, dtype, name), lse_gemm_source(tile, dtype, **options)
    tile = tiles.Tile(combine.BLOCK, combine.BLOCK_T, 0, combine.WARPS, combine.STAGES)
    for entropy in (False, True):
        yield "combine", tile, "entropy" if entropy else "plain", combine_source(entropy)
    for dtype, size in (
        (torch.bfloat16, "i32"),
        (torch.bfloat16, "i64"),
        (torch.float16, "i32"),
        (torch.float32, "i32"),
    ):
        tile = tiles.Tile(1, scale.BLOCK, 0, scale.WARPS, 1)
        yield "scale", tile, f"{NAMES[dtype]}, {size}", scale_source(dtype, size)


def report(cubin: bytes, *options: str) -> str:
    """The output of the disassembler that Triton ships, for this machine code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(BIN / "cuobjdump"), *options, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def resources(cubin: bytes) -> tuple[int, int]:
    """(registers, bytes of local memory) per thread of the machine code; a spill is local memory."""
    usage = report(cubin, "-res-usage")
    registers, stack, local = (max(int(x) for x in re.findall(rf"{name}:(\d+)", usage)) for name in USAGE)
    return registers, stack + local


def loops(sass: str) -> list[tuple[int, int]]:
    """(instructions, barriers) of each innermost loop that does more than wait, in the order of the code.

    A loop is the code between a backward jump and its destination. A wait that spins on its own test does not count,
    and neither does code that was moved after the exit and jumps back to its place.
    """
    code = [(int(m[1], 16), m[2], m[3]) for m in re.finditer(INSTRUCTION, sass)]
    exits = [address for address, name, _ in code if name == "EXIT"]
    jumps = [(int(m[1], 16), address) for address, name, rest in code
             if name.startswith("BRA") and (m := re.search(r"0x([0-9a-f]+)", rest))]  # fmt: skip
    spans = [(first, last) for first, last in jumps
             if last - first > SPIN and not any(first < address < last for address in exits)]  # fmt: skip
    found = []
    for first, last in spans:
        if not any(first <= a and b <= last and (a, b) != (first, last) for a, b in spans):
            body = [name for address, name, _ in code if first <= address <= last]
            found.append((len(body), sum(name.startswith("BAR") for name in body)))
    return found


def contracted(ptx: str) -> list[str]:
    """Products with log₂e that the compiler fused with a difference, so that the product is not rounded.

    A reference must be a rounded product. Only fma(x, log₂e, 0) is sure to be one, because a multiplication may be
    fused with what follows. A value with a reference may be multiplied again only to subtract that reference
    (`residual`).
    """
    number = r"0f[3B][F8]B8AA3B"  # ± log₂e
    register = r"%\w+"
    for zero in re.findall(rf"mov\.b32\s+({register}), 0f00000000;", ptx):
        ptx = re.sub(rf"{zero}\b", "0f00000000", ptx)
    references = dict(re.findall(rf"fma\.rn\.f32\s+({register}), ({register}), {number}, 0f[08]0000000;", ptx))
    negation = rf"(?:neg\.f32\s+({register}), |sub\.f32\s+({register}), 0f[08]0000000, )({register});"
    signs = {first or second: of for first, second, of in re.findall(negation, ptx)}
    found = re.findall(rf"mul\.f32\s+{register}, {register}, {number};", ptx)
    for line, x, addend in re.findall(rf"(fma\.rn\.f32\s+{register}, ({register}), {number}, ({register});)", ptx):
        own = [reference for reference, of in references.items() if of == x]
        if own and signs.get(addend, addend) not in own:
            found.append(line)
    return found


def compile_for(arch: str, *, quick: bool = False, whole: bool = True) -> Iterator[dict[str, Any]]:
    """What the compilers report of the jobs; whole: of all machine code, else only of what test_aot.py reads."""
    amd = arch.startswith("gfx")
    target = GPUTarget("hip", arch, 64) if amd else GPUTarget("cuda", int(arch[3:]), 32)
    for kernel, tile, variant, source in jobs(arch):
        if quick and not is_quick(arch, kernel, variant):
            continue
        options = {"num_warps": tile.num_warps, "enable_fp_fusion": tiles.FP_FUSION}
        if kernel.endswith("_gemm"):
            options["num_stages"] = tile.num_stages
        result: dict[str, Any] = {"arch": arch, "kernel": kernel, "tile": list(tile), "variant": variant}
        try:
            compiled = triton.compile(source, target=target, options=options)
        except Exception as error:  # the table shows which of them fail
            yield result | {"error": f"{type(error).__name__}: {error}"[:400]}
            continue
        result["shared"] = compiled.metadata.shared
        if amd:
            text = compiled.asm["amdgcn"]
            result["registers"] = int(re.search(r"\.vgpr_count:\s+(\d+)", text)[1])
            result["spilled"] = int(re.search(r"\.vgpr_spill_count:\s+(\d+)", text)[1])
        else:
            text = compiled.asm["ptx"]
            result["registers"], result["spilled"] = resources(compiled.asm["cubin"])
            if whole or is_disassembled(arch, kernel, variant):
                sass = report(compiled.asm["cubin"], "-sass")
                result["loops"] = loops(sass)
                result["machine"] = [name for name in MACHINE if re.search(rf"\b{name}\b", sass)]
        result["contracted"] = contracted(text)
        result["instructions"] = [name for name in INSTRUCTIONS if name in text]
        yield result


class NoDevice:
    """Triton's driver for a GPU that this machine lacks, so that launchers can compile what they would launch."""

    target: GPUTarget

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target


def without_device(arch: str, built: Callable[[str], object] = lambda _: None) -> None:
    """From now on, launchers run on CPU tensors as if on `arch`: they compile kernels without launching them.

    Because no kernel runs, results may be NaN, which does not disturb the products here.
    """
    from triton.runtime import driver as active

    NoDevice.target = GPUTarget("cuda", int(arch[3:]), 32)
    active.set_active(NoDevice())
    tiles.architecture = lambda device: arch
    compile_only(built)


def compile_only(built: Callable[[str], object] = lambda _: None, *, load: bool = False) -> None:
    """From now on, launchers compile what they would launch. `built` is called with kernel and shared memory.

    load: also load it onto this machine's GPU: Triton builds the launcher and checks whether the kernel fits.
    """
    from triton.runtime.jit import JITFunction

    run = JITFunction.run

    def build(self, *args, grid, warmup, **options):
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        if load:
            kernel._init_handles()
        products = "fused" if kernel.metadata.enable_fp_fusion else "rounded"
        built(f"{self.fn.__name__} {kernel.metadata.shared} {products}")

    JITFunction.run = build


def small(tile: tiles.Tile) -> tiles.Tile:
    """A tile in the same form that compiles in half the time."""
    sizes = {"block_m": 64, "block_n": 64} if tile.block_k else {"block_n": 512}
    return tile._replace(**sizes, num_warps=4)


def launchers() -> Iterator[str]:
    """Run the driver as if on sm_90, with small tiles. Yields the kernels built."""
    from perce_kernels.contract import Call, Contrasting, Needed, Weighting
    from perce_kernels.gpu import driver

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    built: list[str] = []
    without_device("sm_90", built.append)
    tiles.TABLE = tuple(row._replace(tile=small(row.tile)) for row in tiles.TABLE)
    tiles.WAY["sm_90"] = "fused"
    for n, d, v in ((1, 8, 1), (37, 24, 211), (64, 64, 512)):  # Triton specialises for 1 and for multiples of 16
        hidden, hidden_cf, lm_head = (torch.randn(rows, d, dtype=torch.bfloat16) for rows in (n, n, v))
        target, given, bias = torch.randint(0, v, (n,)), torch.rand(n), torch.randn(v, dtype=torch.bfloat16)
        options = {"ignore_index": -100, "softcap": None, "logit_scale": 1.0, "compact": False}
        call = Call(hidden, lm_head, target, bias, **options)
        both = Weighting(hidden_cf, None, None, Contrasting("log", 0.8, 5.0))
        capped = call._replace(softcap=30.0)
        driver.sweep(call._replace(softcap=1.0), both, Needed(True, True, True))
        for logp_cf, weight in ((given, None), (None, given)):
            other = call._replace(bias=None, ignore_index=2**40, logit_scale=2.0, compact=True)
            weighting = Weighting(None, logp_cf, weight, Contrasting("ratio", 0.0, 1.0))
            driver.sweep(other, weighting, Needed(logp_cf is None, False, False))
        for entropy in (False, True):
            driver.logprobs(capped._replace(ignore_index=1), entropy)
        shard = Shard(dist.group.WORLD, 0, v)
        driver.sweep(capped._replace(compact=True, shard=shard), both, Needed(True, False, False))
        driver.logprobs(call._replace(bias=None, shard=shard), True)
        tiles.WAY["sm_90"] = "stored"
        driver.sweep(capped._replace(compact=True), both, Needed(True, True, True))
        tiles.WAY["sm_90"] = "fused"
        driver.scaled(given, given[0], torch.bfloat16)
        yield from built
        built.clear()


def main(arguments: list[str]) -> None:
    if "--launchers" in arguments:
        print(*launchers(), sep="\n")
        return
    archs = [a for a in arguments if not a.startswith("-")] or list(tiles.SHARED_MEMORY_LIMIT)
    as_json = "--json" in arguments
    if not as_json:
        print(
            "| arch | kernel | m × n × k, warps, stages | variant | registers | spilled bytes | shared bytes "
            "| inner loops: instructions (barriers) |"
        )
        print("| --- " * 8 + "|")
    for arch in archs:
        for r in compile_for(arch, quick="--quick" in arguments, whole=not as_json):
            if as_json:
                print(json.dumps(r), flush=True)
                continue
            m, n, k, warps, stages = r["tile"][:5]
            inner = ", ".join(f"{count} ({barriers})" for count, barriers in r.get("loops", ()))
            numbers = r.get("error") or f"{r['registers']} | {r['spilled']} | {r['shared']} | {inner}"
            print(
                f"| {arch} | {r['kernel']} | {m}×{n}×{k}, {warps}, {stages} | {r['variant']} | {numbers} |", flush=True
            )


if __name__ == "__main__":
    main(sys.argv[1:])
