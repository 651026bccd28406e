"""What an id of a label map means that every package reads alike; imports nothing of ours."""

IGNORE = 255  # unlabelled, in class maps and in material maps
