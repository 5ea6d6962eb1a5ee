"""The AGQ network in its published form."""
