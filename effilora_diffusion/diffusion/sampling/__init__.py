"""Drawing images with a pipeline."""
