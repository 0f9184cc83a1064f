"""Checkpoints: whole or not there, of a run that they name, and fitting every engine and number of processes."""
