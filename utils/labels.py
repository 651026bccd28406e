"""The id in label maps that every package must read alike; imports nothing of ours."""

IGNORE = 255  # unlabelled, in class maps and in material maps
