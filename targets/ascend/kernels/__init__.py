"""Generators of tile programs, one module per family of ops."""
