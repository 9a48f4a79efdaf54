"""DreamBooth on Hydra, PyTorch Lightning and diffusers."""

__version__ = "0.1.0"
