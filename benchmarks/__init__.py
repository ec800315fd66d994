"""Measurements of this project by means from outside it."""
