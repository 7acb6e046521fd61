"""Train DFlash drafters on your own traffic: the library behind `dflash-train`."""

__version__ = "0.1.0"
