"""helexa: open-weight language models on the GPUs you own."""

__version__ = "0.1.0"
