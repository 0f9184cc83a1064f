"""phi3v: fine-tune Phi-3.5-vision natively on transformers 5.

Importing this package registers the model with transformers' Auto classes.
"""

import sys
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .model.configuration_phi3_v import Phi3VConfig
    from .model.image_processing_phi3_v import Phi3VImageProcessor
    from .model.modeling_phi3_v import Phi3VForCausalLM
    from .model.processing_phi3_v import Phi3VProcessor

__version__ = version("phi3v")

__all__ = ["Phi3VConfig", "Phi3VForCausalLM", "Phi3VImageProcessor", "Phi3VProcessor", "__version__"]

_HOMES = {
    "Phi3VConfig": "phi3v.model.configuration_phi3_v",
    "Phi3VForCausalLM": "phi3v.model.modeling_phi3_v",
    "Phi3VImageProcessor": "phi3v.model.image_processing_phi3_v",
    "Phi3VProcessor": "phi3v.model.processing_phi3_v",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'phi3v' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


# The registration lives in phi3v.model and needs torch, seconds that `phi3v --help` must not cost. The command line
# therefore leaves it to the verb that first imports a model; every other importer gets it at once. The processes that a
# verb starts are told its sys.argv.
_program = Path(sys.argv[0])
if not (_program.stem == "phi3v" or _program.match("phi3v/__main__.py") or sys.orig_argv[1:3] == ["-m", "phi3v"]):
    import_module("phi3v.model")
