"""Builds the CPU extension. It is optional: whatever goes wrong, the package still installs."""

from __future__ import annotations

import glob
import os
import sys
from typing import Any

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel

# No -march: each isa_<isa>.cpp switches its instruction set on for its own code only, and the
# right one is picked at run time. Contraction is off because gaps between equal logits must be
# exactly 0; products that should fuse say so.
FLAGS = ["-O3", "-g0", "-std=c++17", "-ffp-contract=off", "-fno-math-errno", "-fvisibility=hidden"]
# The oldest torch whose stable ABI the extension keeps to; a binary built against a newer one still
# loads there.
STABLE_ABI = ("TORCH_TARGET_VERSION", "0x020b000000000000")

# `make test-sanitize` looks for undefined behaviour and stray accesses. At -O3 the compiler may
# have made use of what is looked for, and Python's own flags may define what is not defined.
if os.environ.get("FUSEDKD_SANITIZE"):
    KINDS = "address,undefined,float-cast-overflow"
    FLAGS += [f"-fsanitize={KINDS}", "-fno-sanitize-recover=all", "-fno-wrapv", "-O1", "-g1"]

# `make test-avx512` runs the AVX-512 code on machines that have no such instructions.
if os.environ.get("FUSEDKD_EMULATE_AVX512"):
    FLAGS += ["-DFUSEDKD_EMULATE_AVX512", "-mavx2", "-mfma"]


class Wheel(bdist_wheel):
    """One a platform, for every Python: the extension keeps to torch's ABI, and knows none of
    Python's.
    """

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


def extension() -> dict[str, Any]:
    """The arguments of setup() that add the extension, or none where there is no torch to build
    against.
    """
    if sys.platform == "win32":
        return warn("Windows has no build yet")
    try:
        from torch.utils.cpp_extension import BuildExtension, include_paths, library_paths
    except ImportError as error:
        return warn(f"torch is not importable ({error})")

    class Build(BuildExtension):  # type: ignore[misc]
        """Ninja where there is one; a failure leaves the extension out instead of stopping the
        installation.
        """

        def run(self) -> None:
            try:
                super().run()
            except Exception as error:
                warn(f"the build failed ({type(error).__name__}: {error})")
                self.extensions = []

    native = Extension(
        "fusedkd.kernels.cpu._native",
        sources=sorted(glob.glob("kernels/cpu/*.cpp")),
        depends=sorted(glob.glob("kernels/cpu/*.h")),
        include_dirs=include_paths(),
        library_dirs=library_paths(),
        libraries=["torch_cpu"],
        extra_link_args=[flag for flag in FLAGS if flag.startswith("-fsanitize")],
        define_macros=[STABLE_ABI],
        extra_compile_args=FLAGS,
        language="c++",
    )
    build = Build.with_options(no_python_abi_suffix=True)
    return {"ext_modules": [native], "cmdclass": {"build_ext": build, "bdist_wheel": Wheel}}


def warn(reason: str) -> dict[str, Any]:
    """Say what is missing without it, and go on."""
    print(
        f"\nWARNING: fusedkd is installed without its C++ extension: {reason}.\n"
        "CPU tensors will go through the slow fp64 reference. For the fast kernels, install a C++ "
        "compiler "
        "(g++ or clang) and reinstall.\n",
        file=sys.stderr,
    )
    return {}


setup(**extension())
