"""Which kernels compute: the fastest ones of this processor, or those that every x86-64 processor has.

Sums of floats depend on their order, and the libraries choose the order by the processor. Of training, Intel's MKL
alone decides it, through MKL_CBWR: under COMPATIBLE an AMD EPYC and an Intel Xeon take one path. ATen's kernels for
AVX2 and AVX-512 take the same path as each other; its slowest ones, which a variable can ask for, do not.
"""

import os

MKL, ATEN = "MKL_CBWR", "ATEN_CPU_CAPABILITY"


def choose_portable() -> None:
    """Let the processes that are started from now on compute with kernels that take one path on x86-64 with AVX2.

    MKL reads its variable once, so a process that has computed keeps what it had.
    """
    os.environ[MKL] = "COMPATIBLE"
    os.environ.pop(ATEN, None)


def kernels() -> dict[str, str]:
    """Return what a manifest says of the kernels of this process: nothing, unless they are the portable ones."""
    portable = os.environ.get(MKL) == "COMPATIBLE" and ATEN not in os.environ
    return {"kernels": "portable"} if portable else {}
