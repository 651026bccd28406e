"""What every stage needs and none owns: configuration, processes, checkpoints, loop, metrics."""
