"""``python -m flpriv``."""

from flpriv.cli import main

if __name__ == "__main__":
    main()
