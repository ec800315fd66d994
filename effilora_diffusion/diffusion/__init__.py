"""EffiLoRA on diffusers: attention processors, training, sampling and files."""
