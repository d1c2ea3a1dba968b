"""Pictures, plots and TensorBoard's event files."""
