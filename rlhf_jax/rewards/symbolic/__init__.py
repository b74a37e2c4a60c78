"""Comparison by computer algebra, in processes of its own (`rewards/workers.py`): it may take for ever."""
