"""Who is next, and where: the queue and the dispatcher over all slots."""
