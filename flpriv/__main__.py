"""``python -m flpriv``."""

from flpriv.cli import main

main()
