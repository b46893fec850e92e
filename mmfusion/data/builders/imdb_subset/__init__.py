"""A subset of the Large Movie Review Dataset."""
