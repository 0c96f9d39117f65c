"""Doors to other programs, a file each, and how to install it."""
