"""What to do, where and when. Pure: no await, no clock, no path, no socket; time and rates come in as arguments."""
