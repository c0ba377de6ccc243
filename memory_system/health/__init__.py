"""The parts of the health manager: error history, broadcast, watching, healing."""
