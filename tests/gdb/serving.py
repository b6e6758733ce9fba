"""The product's own way to serve a machine from a thread, under the name that tests know it by."""

from gdbstub.serving import Served, serve

__all__ = ["Served", "serve"]
