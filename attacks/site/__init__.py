"""Attribute inference: which hospital, which sex, what age, from what a trained model makes of an image."""
