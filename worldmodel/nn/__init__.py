"""Networks, attention, the mathematics of diffusion, running moments: what parts are built of."""
