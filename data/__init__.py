"""Pairs of visible and infrared images: reading, synthesis, labels, order."""
