"""flpriv audits the privacy of federated learning on medical images.

Everything installs under this one name. The four families live in top-level folders of a checkout and are reached here as
``flpriv.clients``, ``flpriv.strategies``, ``flpriv.attacks`` and ``flpriv.defenses``.
"""

from pathlib import Path

__version__ = "0.1.0"

_here = Path(__file__).resolve().parent
if not (_here / "attacks").is_dir() and (_here.parent / "attacks").is_dir():
    # A Flower app bundle or a checkout without links has dropped the links to the families: look beside this package.
    __path__.append(str(_here.parent))
del _here
