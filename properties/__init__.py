"""Magnetic properties of materials from any ASE calculator with atomic moments."""
