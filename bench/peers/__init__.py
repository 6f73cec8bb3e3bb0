"""The torch engine beside others that serve the same weights."""
