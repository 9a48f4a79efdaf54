"""``python launch.py key=value ...``: the same program as ``dreambooth``, from a checkout."""

from dreambooth.cli import main

if __name__ == "__main__":
    main()
