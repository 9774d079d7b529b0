"""Errors that a user can act on. The command line prints the message and exits with ``exit_code``."""

from __future__ import annotations


class LinertError(Exception):
    """Base of every error that says what was found, what was expected and what to do."""

    exit_code = 2


class BundleError(LinertError):
    """A bundle is damaged, incomplete, or of another schema."""


class RequestError(LinertError):
    """A request asks for what the bundle cannot do."""


class GeometryError(LinertError):
    """Cache settings do not fit the image."""


class OutputError(LinertError):
    """A result cannot be written where it was asked for."""


class CheckpointError(LinertError):
    """A checkpoint cannot be read, or does not hold the model that was expected."""


class ExportError(LinertError):
    """A bundle cannot be made as asked."""


class DeviceError(LinertError):
    """There is no such device here, or it cannot do what it was asked."""
