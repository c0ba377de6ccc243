"""Agents: programs that answer requests and keep what they know in the memory service."""
