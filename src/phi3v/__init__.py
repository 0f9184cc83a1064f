"""phi3v: fine-tune Phi-3.5-vision natively on transformers 5.

Importing this package registers the model with transformers' Auto classes.
"""

import sys
from importlib import import_module
from importlib.metadata import version
from itertools import pairwise
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


def _is_own_program() -> bool:
    """Whether this process runs the command line, one of the recipes' scripts, or work that this package handed out.

    The registration lives in phi3v.model and needs torch and peft: seconds and memory that ``--help``, a conversion and
    a process that decodes videos must not cost. Such programs leave it to whatever first imports a model.
    """
    program = Path(sys.argv[0])
    is_command = program.stem == "phi3v" or program.match("phi3v/__main__.py")
    # While Python looks for ``-m phi3v``, with whatever options before it, the program's name is not known yet.
    # Processes that the command starts are told its sys.argv.
    if is_command or (sys.argv[0] == "-m" and ("-m", "phi3v") in pairwise(sys.orig_argv)):
        return True
    if program.is_file() and program.absolute().parent == Path(__file__).parents[2] / "recipes":
        return True
    return "multiprocessing.process" in sys.modules and import_module("phi3v.data.processes").is_worker()


# Every other importer finds the model among transformers' Auto classes at once.
if not _is_own_program():
    import_module("phi3v.model")
