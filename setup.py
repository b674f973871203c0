"""What pyproject.toml cannot say: a wheel built where a C++ compiler is holds the native engine, compiled for
every kind of processor of the machine's architecture. An editable install compiles nothing; there, as in a
wheel without it, the engine is compiled when it is first needed (drivers/native/library.py).

$LLMASOS_BUILD_MACHINE (x86_64 or aarch64) builds for a named machine, with $CXX its compiler; then no engine
may be missing.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

ENGINES = Path("llmasos/drivers/native/lib")

_path = Path(__file__).parent / "drivers" / "native" / "build.py"
_spec = importlib.util.spec_from_file_location("llmasos_engine_build", _path)
assert _spec
assert _spec.loader
build: Any = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = build
_spec.loader.exec_module(build)

NAMED = os.environ.get("LLMASOS_BUILD_MACHINE", "")
MACHINE = NAMED or platform.machine()


class BuildPackage(build_py):
    """Compiles into the build folder; what a compiler does not know (an old one) is left out."""

    def run(self) -> None:
        super().run()
        compiler = build.find_compiler()
        if self.editable_mode or not compiler or platform.system() != "Linux":
            return
        folder = Path(self.build_lib) / ENGINES
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob("engine-*.so"):
            old.unlink()

        def make(variant: Any) -> None:
            try:
                build.compile_engine(variant, compiler, folder / build.file_name(variant, MACHINE))
            except build.CompileError as problem:
                if NAMED:
                    raise
                self.warn(f"no engine {variant.name}: {problem}")

        with ThreadPoolExecutor(2) as threads:
            list(threads.map(make, build.variants(MACHINE)))


class BuildWheel(bdist_wheel):
    """Tagged with the platform if there are engines in it, else for any."""

    def get_tag(self) -> tuple[str, str, str]:
        if not self._has_engines():
            return super().get_tag()
        named = self.plat_name if self.plat_name_supplied else f"linux_{MACHINE}"
        return "py3", "none", named.replace("-", "_").replace(".", "_")

    def write_wheelfile(self, *args: Any, **kwargs: Any) -> None:
        self.root_is_pure = not self._has_engines()
        super().write_wheelfile(*args, **kwargs)

    def _has_engines(self) -> bool:
        folder = Path(self.get_finalized_command("build_py").build_lib) / ENGINES
        return any(folder.glob("engine-*.so"))


# Its own name, which a build front end does not tell, keeps this file out of the package.
setup(script_name="setup.py", cmdclass={"build_py": BuildPackage, "bdist_wheel": BuildWheel})
