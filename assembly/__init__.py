"""Code that combines the packages: builds models from checkpoints, caches latents, compares."""
