"""When maintenance runs: what memory_scheduler.py is made of."""
