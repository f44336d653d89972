"""Pure thinking: no await, no clock, no path, no socket. Time and rates come in as arguments."""
