"""Containers, one per file. What they hold comes from outside: every size is checked before use."""
