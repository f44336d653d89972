"""Who shares how long a prefix, and what of it can be used. Pure: no await, no clock, no path, no socket."""
