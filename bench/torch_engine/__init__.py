"""The torch engine by itself: no server, no daemon."""
