"""MNIST images paired with Free Spoken Digit recordings."""
