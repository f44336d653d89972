"""The state of one llama-server process: connection, slots, leases and steps. All of it ends with the process."""
