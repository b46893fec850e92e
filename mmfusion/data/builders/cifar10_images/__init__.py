"""CIFAR-10 as JPEG files."""
