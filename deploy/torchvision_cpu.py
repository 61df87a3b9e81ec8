"""Let torchvision and torchaudio load beside CPU-only torch.

Package registries carry both only as built against CUDA torch, and vLLM, transformers and the Qwen-VL processors import
them wherever they are installed. Beside CPU torch `import torchvision` fails with "operator torchvision::nms does not
exist": declaring the two missing operators just before is enough, nothing here calls them. `import torchaudio` fails to
load its CUDA extension: it is told that there is none, as in its builds without one. As every subprocess needs
this, `python deploy/torchvision_cpu.py` installs this file as an import hook into the running environment, through a
`.pth` file. It does nothing where torch has CUDA, or where both are CPU builds.
"""

from __future__ import annotations

import contextlib
import importlib.abc
import importlib.util
import sys


class _DeclareOperators(importlib.abc.MetaPathFinder):
    """Intercepts `import torchvision`, declares the operators of its missing C++ library, and removes itself."""

    def find_spec(self, fullname, path=None, target=None):  # type: ignore[no-untyped-def]
        if fullname == "torchvision":
            sys.meta_path.remove(self)
            import torch

            if torch.version.cuda is None:
                schema = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
                for operator in ("nms", "qnms"):
                    with contextlib.suppress(RuntimeError):  # already defined: a build that has it
                        torch.library.define(f"torchvision::{operator}", schema)


class _NoExtension(importlib.abc.Loader):
    """Gives `torchaudio._extension` the contents that it has in builds without the library."""

    def exec_module(self, module):  # type: ignore[no-untyped-def]
        def fail_if_no_align(function):  # type: ignore[no-untyped-def]
            def fail(*args, **kwargs):  # type: ignore[no-untyped-def]
                raise RuntimeError(f"{function.__name__} needs torchaudio's extension, which this torch cannot load")

            return fail

        module._IS_TORCHAUDIO_EXT_AVAILABLE = False
        module.fail_if_no_align = fail_if_no_align


class _SkipUnloadableExtension(importlib.abc.MetaPathFinder):
    """Intercepts `import torchaudio._extension` and replaces the module if its library cannot be loaded."""

    def find_spec(self, fullname, path=None, target=None):  # type: ignore[no-untyped-def]
        if fullname == "torchaudio._extension":
            import ctypes
            from pathlib import Path

            try:
                for library in Path(path[0]).glob("lib/_torchaudio*.so"):
                    ctypes.CDLL(str(library))
            except OSError:
                return importlib.util.spec_from_loader(fullname, _NoExtension())
        return None


def install() -> None:
    """Copy this file into the environment's site-packages, with a `.pth` that imports it at start-up."""
    import shutil
    import sysconfig
    from pathlib import Path

    site = Path(sysconfig.get_paths()["purelib"])
    shutil.copy(__file__, site / "_saccade_torchvision_cpu.py")
    (site / "_saccade_torchvision_cpu.pth").write_text("import _saccade_torchvision_cpu\n")
    print(f"installed the torchvision import hook into {site}")


if __name__ == "__main__":
    install()
else:
    sys.meta_path[:0] = [_DeclareOperators(), _SkipUnloadableExtension()]
