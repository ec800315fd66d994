"""Adapters on diffusers models: attention processors, loading, plain LoRA files, export."""
