"""Membership inference: was this record trained on? Scores for candidates, from a model or from updates."""
