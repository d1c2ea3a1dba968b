"""A training run around the loop: evaluation, checkpoints, progress, signals, recorded experience, TensorBoard."""
