"""What joins Stable-Baselines3 and a world model: its algorithms inside the dream, Dyna, encoders in its policies."""
