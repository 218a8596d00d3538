"""Test-time search for better noise."""
