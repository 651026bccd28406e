"""What exists for speed alone; `models/fast/plan.py` is the only way in."""
