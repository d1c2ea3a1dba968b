"""Environments that step together: adapted, checked, in processes, made anew when they fail, in plain spaces."""
