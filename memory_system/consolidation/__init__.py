"""Merging memories that fade: which belong together, what is said of them, and what the merged memory is like.

Everything here is a function of its arguments; storage/consolidations.py writes, service/consolidating.py reads.
"""
