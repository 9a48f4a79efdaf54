"""Families of networks, siblings of each other: which networks there are, how they encode, denoise, load and save."""
