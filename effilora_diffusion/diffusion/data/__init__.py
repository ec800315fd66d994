"""Training data: folders of images, captions, latents, class images."""
