"""Measurements of a trained model: open-loop errors, latent space and likelihood."""
