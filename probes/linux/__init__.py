"""The guest's operating system, seen from outside."""
