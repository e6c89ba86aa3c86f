"""Figures from files that runs wrote; nothing here trains, and no other room imports this one."""
