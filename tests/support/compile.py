"""C for the guest: relocatable objects made by the machine's compiler.

Rules: tests only. -m32 needs no libraries here: nothing is linked and no header of the system is read.
"""

from __future__ import annotations

import functools
import subprocess
import tempfile
from pathlib import Path

SAMPLES = Path(__file__).parents[1] / "probes" / "samples"
_COMMON = ("-c", "-O2", "-ffreestanding", "-nostdinc", "-fno-stack-protector", "-fno-asynchronous-unwind-tables")
_KERNEL = {
    64: ("-m64", "-mcmodel=kernel", "-mno-red-zone", "-mno-sse", "-fno-pic"),
    32: ("-m32", "-mregparm=3", "-fno-pic"),
}


@functools.cache
def compile_sample(name: str, bits: int, *more: str) -> bytes:
    """The object made of samples/NAME.c with a kernel's options, and `more` of them."""
    return compile_c((SAMPLES / f"{name}.c").read_text(), bits, *_KERNEL[bits], *more)


@functools.cache
def compile_c(source: str, bits: int, *options: str) -> bytes:
    """The object made of `source` with just these options (-m64 or -m32 comes by itself)."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "sample.c")
        path.write_text(source)
        command = ["cc", *_COMMON, f"-m{bits}", *options, "-I", str(SAMPLES), "-o", f"{folder}/sample.o", str(path)]
        subprocess.run(command, check=True, capture_output=True)
        return Path(folder, "sample.o").read_bytes()
