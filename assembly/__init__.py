"""What joins the packages: models built from checkpoints, latents cached, variants compared."""
