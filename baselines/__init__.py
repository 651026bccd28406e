"""Other methods on the same data, loop and metrics, to compare with."""
