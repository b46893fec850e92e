"""Product photos with their titles."""
