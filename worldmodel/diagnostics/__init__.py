"""Measurements of a trained model: open-loop errors, latent space, likelihood, validity of samples."""
