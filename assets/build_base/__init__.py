"""Builds the embedded base from pinned packages of openly licensed emoji art."""
