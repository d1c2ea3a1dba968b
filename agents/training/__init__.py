"""What surrounds the loop in a run: evaluation and checkpoints on the way, progress, signals, recorded experience, TensorBoard."""
