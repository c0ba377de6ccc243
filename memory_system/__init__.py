"""What the programs of the memory system share; the layers are listed in docs/architecture.md."""

__version__ = "0.1.0"
