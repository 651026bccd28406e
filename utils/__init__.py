"""What all stages share: configuration, processes, checkpoints, loop, metrics."""
