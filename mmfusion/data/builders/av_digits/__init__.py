"""MNIST pictures paired with Free Spoken Digit recordings."""
