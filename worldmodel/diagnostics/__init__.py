"""What a model believes, measured: roll-outs against what came, and the shape of the latent space."""
