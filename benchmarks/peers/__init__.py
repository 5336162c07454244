"""The same operations on other systems' published wheels, each in an environment of its own."""
