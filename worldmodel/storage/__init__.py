"""What lies on the disk: replay and segments, recordings, checkpoints, run folders."""
