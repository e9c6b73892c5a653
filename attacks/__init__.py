"""Attacks: what an adversary can make of a capture. One file an attack, named as the attack."""
