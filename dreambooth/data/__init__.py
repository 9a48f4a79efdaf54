"""What the network learns from: pictures, their latents, and the order in which they come."""
