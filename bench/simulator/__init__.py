"""llamaslot's own policy, scheduler, steps and shelf against a simulated llama-server, in virtual time."""
