"""The queue, and the dispatcher that leases the slots of all backends to requests."""
