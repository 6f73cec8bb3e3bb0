"""Why there is no GPU to be had. Private to discovery: outside it a fault is a sentence."""

from __future__ import annotations

from typing import Final

MISMATCH: Final = (
    "the NVIDIA driver was updated without a reboot (driver/library version mismatch): reboot this host, or reload "
    "the nvidia kernel modules; no model can be loaded until then"
)


class NoGpu(Exception):
    """This way of looking finds none; another may."""


class DriverMismatch(Exception):
    """The library in user space and the kernel module are of different versions: no way of looking can work."""
