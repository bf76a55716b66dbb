"""TRL's kernels without what TRL wants around them: its wheel and packaging's in ``.whl/`` will do.

``trl.kernels`` needs two names of other modules, of which one asks for transformers and the other
for DeepSpeed's sharded weights; the packages themselves import some 90 MB of wheels.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any


def prepare() -> None:
    """Make ``trl.kernels.chunked_divergence`` importable where trl is, but does not import."""
    spec = importlib.util.find_spec("trl")
    if spec is None or not spec.submodule_search_locations:
        return
    try:
        importlib.import_module("trl.kernels.chunked_divergence")
        return
    except Exception:  # whatever it lacks
        _forget("trl", "transformers")
    folder = Path(next(iter(spec.submodule_search_locations)))
    _stand_in("trl", folder)
    _stand_in("trl.kernels", folder / "kernels")
    _stand_in("trl.trainer", folder / "trainer")
    gather = {"maybe_gather_lm_head_ctx": lambda *parameters: contextlib.nullcontext()}
    _stand_in("trl.trainer.utils", None, **gather)
    _stand_in("transformers", None)
    _stand_in("transformers.utils", None, is_triton_available=lambda: True)
    with contextlib.suppress(Exception):  # the race says what is missing then
        importlib.import_module("trl.kernels.chunked_divergence")
    _forget("transformers")


def _stand_in(name: str, folder: Path | None, **names: Any) -> None:
    """A module whose own file is not run; of a package, those in ``folder`` are found."""
    module = ModuleType(name)
    if folder is not None:
        module.__path__ = [str(folder)]
    vars(module).update(names)
    sys.modules[name] = module


def _forget(*packages: str) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] in packages]:
        del sys.modules[name]
