"""Let torchvision load beside CPU-only torch.

Package registries carry torchvision only as built against CUDA torch; beside CPU torch `import torchvision` fails with
"operator torchvision::nms does not exist", and vLLM's model inspection and the Qwen-VL processors need that import.
Declaring the two missing operators just before the import is enough: nothing here calls them. As every subprocess
needs it, `python deploy/torchvision_cpu.py` installs this file as an import hook into the running environment, through
a `.pth` file. It does nothing where torch has CUDA, or where torchvision is a CPU build that brings the operators.
"""

from __future__ import annotations

import importlib.abc
import sys


class _DeclareOperators(importlib.abc.MetaPathFinder):
    """Sees `import torchvision` first, declares what its missing C++ library would have, and steps aside."""

    def find_spec(self, fullname, path=None, target=None):  # type: ignore[no-untyped-def]
        if fullname == "torchvision":
            sys.meta_path.remove(self)
            import torch

            if torch.version.cuda is None:
                schema = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
                for operator in ("nms", "qnms"):
                    try:
                        torch.library.define(f"torchvision::{operator}", schema)
                    except RuntimeError:  # already defined: a build that has it
                        pass
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
    sys.meta_path.insert(0, _DeclareOperators())
