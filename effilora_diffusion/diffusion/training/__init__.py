"""The training run of image models."""
