"""Code as a user would write it, outside the package."""
