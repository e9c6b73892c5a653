"""Defences a site can switch on: one file each, Flower mods by themselves."""
