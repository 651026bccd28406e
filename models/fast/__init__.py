"""Code that exists only for speed; `models/fast/plan.py` is the only entry point."""
