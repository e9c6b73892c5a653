"""The public conformance suite: one line says whether an attack or a defence keeps its contract and does what it claims.

>>> from flpriv.testing import check_attack, check_defense  # doctest: +SKIP
>>> check_attack(MyAttack())  # doctest: +SKIP
"""

from flpriv.testing.attacks import check_attack, score
from flpriv.testing.defenses import check_defense
from flpriv.testing.federation import Glass, blindfold, dense_net, glass, withhold

__all__ = ["Glass", "blindfold", "check_attack", "check_defense", "dense_net", "glass", "score", "withhold"]
