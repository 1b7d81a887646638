"""``python -m mmcli``."""

from .cli import main

main()
