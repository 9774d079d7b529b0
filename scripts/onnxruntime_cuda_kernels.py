#!/usr/bin/env python3
"""Ask ONNX Runtime's CUDA build, on a machine without a GPU, what it has kernels for and what it would do with a bundle.

    pip download --no-deps --dest wheels 'onnxruntime-gpu>=1.31'
    python scripts/onnxruntime_cuda_kernels.py wheels/onnxruntime_gpu-*.whl --table tests/data/onnxruntime_cuda_kernels.json
    python scripts/onnxruntime_cuda_kernels.py wheels/onnxruntime_gpu-*.whl --bundle bundle

The wheel's own libraries are loaded over stand-ins of CUDA, cuBLAS, cuDNN and TensorRT, which are compiled on the spot (by cc; the
CUDA runtime's is stand_in_cuda.c), hold memory and compute nothing. So its registry of kernels is read as it stands, models are cut
into what CUDA and what the CPU runs, and graphs are captured by the code that does so on a GPU. Of every stage of a bundle it is
said which operators are on the CPU, how many kernels its CUDA graph launches, and what a capture must not hold and does: copies from
and to the host, allocations, waiting. Image decoders are loaded and not run, since convolutions need a real cuDNN.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections import Counter, defaultdict
from pathlib import Path

import click

HERE = Path(__file__).parent
OPSETS = range(21, 25)
"""Versions of the operators that bundles are traced to."""

OPEN_END = 2**31 - 1
UNCAPTURABLE = re.compile(r"captured ((?:copy(?: and wait)? (?:host|device to host)|allocate|free|wait).*)")


@click.command(help=__doc__)
@click.argument("wheel", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--table", type=click.Path(path_type=Path), help="Write the kernels of standard operators here."
)
@click.option(
    "--bundle",
    "bundles",
    type=click.Path(exists=True, path_type=Path),
    multiple=True,
    help="Load its stages.",
)
def main(wheel: Path, table: Path | None, bundles: tuple[Path, ...]) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder / "wheel")
        libraries = folder / "libraries"
        libraries.mkdir()
        for library in ("cuda", "tensorrt"):
            path = folder / "wheel" / "onnxruntime" / "capi" / f"libonnxruntime_providers_{library}.so"
            write_stand_ins(path, libraries)
        paths = [str(folder / "wheel"), str(HERE.parent), os.environ.get("PYTHONPATH", "")]
        environment = {
            **os.environ,
            "LD_LIBRARY_PATH": str(libraries),
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "STAND_IN_LOG": str(folder / "log"),
        }

        def inside(*arguments: object) -> str:
            done = subprocess.run(
                [sys.executable, __file__, "--inside", *map(str, arguments)],
                env=environment,
                stdout=subprocess.PIPE,
                text=True,
                check=True,
            )
            return done.stdout

        if table is not None:
            table.write_text(inside())
        for bundle in bundles:
            click.echo(inside(bundle), nl=False)


def write_stand_ins(library: Path, folder: Path) -> None:
    """Compile a library for each that ``library`` needs of NVIDIA, with the functions that it imports from it.

    Functions return 0; those that create something give a handle. cuDNN's are looked up by name at run time: all names that
    occur are there.
    """
    dynamic = subprocess.run(["readelf", "-dW", library], capture_output=True, text=True, check=True).stdout
    imports = subprocess.run(
        ["nm", "-D", "--undefined-only", library], capture_output=True, text=True, check=True
    ).stdout
    wanted: defaultdict[str, set[str]] = defaultdict(set)
    for needed in re.findall(r"NEEDED.*\[(lib(?:cu|nv)\w+\.so\.\d+)\]", dynamic):
        wanted[needed] = set()
    for function, owner in re.findall(r" U (\w+)@(lib(?:cu|nv)\w+\.so\.\d+)", imports):
        wanted[owner].add(function)
    # Without a version, an import does not say whose it is.
    for function in re.findall(r" U ((?:cu[A-Z]|create|get)\w+)$", imports, re.MULTILINE):
        wanted["libcuda.so.1" if function.startswith("cu") else "libnvinfer.so.10"].add(function)
    names = set(re.findall(rb"\0(cudnn[A-Z]\w+)(?=\0)", library.read_bytes()))
    wanted["libcudnn.so.9"] |= {name.decode() for name in names}
    for name, functions in wanted.items():
        _compile(folder, name, functions)


def _compile(folder: Path, name: str, functions: set[str]) -> None:
    source, versions = folder / f"{name}.c", folder / f"{name}.map"
    code = (HERE / "stand_in_cuda.c").read_text() if name.startswith("libcudart") else ""
    written = set(re.findall(r"^[\w *]+?\b(\w+)\(", code, re.MULTILINE))
    known = folder / f"{name}.functions"
    functions |= set(known.read_text().split()) if known.exists() else set()
    known.write_text("\n".join(functions))
    code += "static long handle[64];\n"
    for function in sorted(functions - written):
        if "Create" in function and "Backend" not in function:
            code += f"int {function}(void **made) {{ *made = handle; return 0; }}\n"
        elif function.endswith("GetVersion"):
            code += f"unsigned long {function}(void) {{ return 91301; }}\n"
        elif function.endswith("String") or "GetStatusName" in function:
            code += f'const char *{function}(int status) {{ return "of the stand-in"; }}\n'
        else:
            code += f"int {function}(void) {{ return 0; }}\n"
    source.write_text(code)
    versions.write_text(f"{name} {{ global: *; }};\n")
    options = ["-w", "-O1", "-shared", "-fPIC", f"-Wl,-soname,{name}", f"-Wl,--version-script,{versions}"]
    subprocess.run(["cc", *options, source, "-o", folder / name], check=True)


def kernel_table() -> str:
    """JSON: the version, and by operator each kernel's first and last version and the types of its parameters."""
    import onnxruntime
    from onnxruntime.capi import _pybind_state

    kernels: defaultdict[str, list[tuple[int, int | None, dict[str, list[str]]]]] = defaultdict(list)
    for kernel in _pybind_state.get_all_opkernel_def():
        first, last = kernel.version_range
        if (kernel.provider, kernel.domain) != ("CUDAExecutionProvider", "") or last < OPSETS[0]:
            continue
        if first <= OPSETS[-1]:
            types = {
                name: sorted(re.sub(r"^tensor\((\w+)\)$", r"\1", kind) for kind in kinds)
                for name, kinds in sorted(kernel.type_constraints.items())
            }
            kernels[kernel.op_name].append((first, None if last == OPEN_END else last, types))
    operators = []
    for name, versions in sorted(kernels.items()):
        listed = ",\n    ".join(sorted(map(json.dumps, _merged(versions))))
        operators.append(f'  "{name}": [\n    {listed}\n  ]')
    head = f'{{"onnxruntime": "{onnxruntime.__version__}", "kernels": {{\n'
    return head + ",\n".join(operators) + "\n}}\n"


def _merged(
    kernels: list[tuple[int, int | None, dict[str, list[str]]]],
) -> list[tuple[int, int | None, dict[str, list[str]]]]:
    """One entry for kernels that differ in the types of a single parameter, their only one."""
    merged = []
    single: dict[tuple[int, int | None, str], list[str]] = {}
    for first, last, types in kernels:
        if len(types) != 1:
            merged.append((first, last, types))
            continue
        [(parameter, kinds)] = types.items()
        if (first, last, parameter) not in single:
            merged.append((first, last, {parameter: single.setdefault((first, last, parameter), [])}))
        single[first, last, parameter] += kinds
    return merged


def report_of(bundle: Path) -> str:
    """What becomes of every stage."""
    import onnxruntime

    from linert.runtime.backends.ort_cuda import OrtCudaBackend
    from linert.runtime.bundles.bundle import open_bundle
    from linert.runtime.errors import LinertError

    log = Path(os.environ["STAND_IN_LOG"])

    def fate(backend: OrtCudaBackend, stage: str) -> str:
        log.write_text("")
        try:
            backend.load(stage)
            if stage != "vq_decoder":
                backend.run(stage)
        except LinertError as error:
            return str(error).strip()
        logged = log.read_text()
        captured = re.search(r"end capture: (\d+) launches", logged)
        graph = f"a CUDA graph of {captured[1]} kernels" if captured else "loaded, no CUDA graph captured"
        uncapturable = Counter(UNCAPTURABLE.findall(logged))
        faults = "".join(f"; the capture holds {count} x {what}" for what, count in uncapturable.items())
        on_cpu = backend.operators_without_kernel(stage)
        return f"{graph}{faults}{f'; on the CPU: {on_cpu}' if on_cpu else ''}"

    try:
        opened = open_bundle(bundle)
        backend = OrtCudaBackend(opened, opened.manifest.stages)
        lines = [f"  {stage}: {fate(backend, stage)}" for stage in opened.manifest.stages]
    except LinertError as error:
        lines = [f"  {error}"]
    return "\n".join([f"{bundle}, ONNX Runtime {onnxruntime.__version__}", *lines]) + "\n"


if __name__ == "__main__":
    if sys.argv[1:2] == ["--inside"]:
        sys.stdout.write(report_of(Path(sys.argv[2])) if sys.argv[2:] else kernel_table())
    else:
        main()
