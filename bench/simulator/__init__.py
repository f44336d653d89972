"""llamaslot's own policy, scheduler, steps and snapshot table against a simulated llama-server, in virtual time."""
