"""How good a result is, in the paper's numbers: encoders that look at pictures, and scores of what they see."""
