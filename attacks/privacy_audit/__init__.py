"""Audits of differential privacy: canaries planted at a site, and how surely it can be told which of them were in."""
