"""The malicious server: traps, what an operator sends in place of the honest model, and how they are read out."""
