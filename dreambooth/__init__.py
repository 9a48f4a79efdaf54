"""DreamBooth on Hydra, PyTorch Lightning and diffusers.

``train(compose(["model=pocket", "trainer.max_steps=20"]))`` is what ``dreambooth model=pocket trainer.max_steps=20``
runs. The names load on first use, so that ``import dreambooth`` stays instant.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dreambooth.config import compose as compose
    from dreambooth.errors import UserError as UserError
    from dreambooth.generation import generate as generate
    from dreambooth.tasks import train as train

__version__ = "0.1.0"
__all__ = ["UserError", "compose", "generate", "train"]

_HOME = {
    "UserError": "dreambooth.errors",
    "compose": "dreambooth.config",
    "generate": "dreambooth.generation",
    "train": "dreambooth.tasks",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'dreambooth' has no attribute '{name}'")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value
